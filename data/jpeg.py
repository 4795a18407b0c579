"""Cut a JPEG down to the data that a crop needs, without decoding it.

Its pixels are compressed from top to bottom and cannot be entered in the middle, but a decoder can stop below the
crop. A progressive file has the means of the blocks of 8 x 8 pixels in scans of their own (ITU-T T.81, annex G); at
1/8 scale nothing else is needed.
"""

import re

_SOI_BYTES = 2
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2  # frames with Huffman coding
_DHT, _EOI, _SOS = 0xC4, 0xD9, 0xDA
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed byte nor a restart
_BLOCK = 8
# Huffman table 3 for AC coefficients, of a single code: "no more coefficients in this block".
_END_OF_BLOCK_TABLE = bytes([0xFF, _DHT, 0, 20, 0x13, 1, *[0] * 15, 0])


def cut_jpeg(data: bytes, bottom: float, num_times_smaller: int) -> tuple[bytes, int]:
    """Return a JPEG with the same pixels in the rows above `bottom`, and the number of its rows.

    Args:
        num_times_smaller: The scale at which it will be decoded. Other scales need the whole data.

    Raises:
        ValueError: If the structure of the file is not understood.
    """
    try:
        frame, scans = _structure(data)
    except IndexError:
        raise ValueError("the file ends within its header") from None
    height = int.from_bytes(data[frame + 5 : frame + 7])
    if not height:
        raise ValueError("the number of rows follows the pixels")
    sampling = {data[at]: data[at + 1] for at in range(frame + 10, frame + 10 + 3 * data[frame + 9], 3)}
    rows_of_blocks = _BLOCK * max(factors & 15 for factors in sampling.values())
    # One more row of blocks, because colors of lower resolution are interpolated between rows.
    rows = min(height, (-(-int(-(-bottom // 1)) // rows_of_blocks) + 1) * rows_of_blocks)
    kept = bytearray(data[: frame + 5] + rows.to_bytes(2) + data[frame + 7 :])
    if data[frame + 1] == _PROGRESSIVE and num_times_smaller == _BLOCK:
        # Colors of lower resolution are decoded at 1/4 scale.
        sharp = [component for component, factors in sampling.items() if factors == max(sampling.values())]
        for start, end in reversed(scans):
            if data[start + 5] in sharp and data[start + 5 + 2 * data[start + 4]] > 0:
                del kept[start:end]
        # Without any coefficients besides the means, libjpeg would guess them: declare all others to be zero.
        end_of_image = kept.rindex(bytes([0xFF, _EOI]))
        kept[end_of_image:end_of_image] = b"".join([_END_OF_BLOCK_TABLE, *map(_empty_scan, sharp)])
    return bytes(kept), rows


def _structure(data: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Return where the frame header starts, and start and end of each scan of a progressive file."""
    position, frame, scans = _SOI_BYTES, None, []
    while True:
        if data[position] != 0xFF:
            raise ValueError(f"no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _EOI:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (_DHT, 0xC8, 0xCC):
            if frame is not None or marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE):
                raise ValueError(f"frame of type {marker:#x}")
            frame = position
        if marker == _SOS:
            if frame is None:
                raise ValueError("a scan before the frame header")
            if data[frame + 1] != _PROGRESSIVE:
                break
            found = _NEXT_MARKER.search(data, end)
            if found is None:
                raise ValueError("a scan without an end")
            scans.append((position, found.start()))
            end = found.start()
        position = end
    if frame is None:
        raise ValueError("no frame header")
    return frame, scans


def _empty_scan(component: int) -> bytes:
    """Return a scan in which all blocks of a component end at once."""
    return bytes([0xFF, _SOS, 0, 8, 1, component, 0x03, 1, 63, 0])
