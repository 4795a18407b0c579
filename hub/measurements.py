"""How to prepare measurements for an exported encoder or classifier: an image processor only standardizes them."""

from collections.abc import Sequence

from hub.markdown import escape

_USAGE = '''\
This is a standard transformers model of images with {number} channels of measurements. Its image processor only
standardizes: resize images and cut off values outside the range of each channel first, as this code does.

| channel | lowest value | highest value |
|---|---|---|
{ranges}

```python
import numpy as np
import tifffile
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

checkpoint = ""
processor = AutoImageProcessor.from_pretrained(checkpoint)
model = {auto_class}.from_pretrained(checkpoint).eval()


def prepare(image):
    """Resize the central part of an image (channels, height, width), and cut off values outside their range."""
    rows, columns = processor.crop_size["height"], processor.crop_size["width"]
    height, width = image.shape[1:]
    scale = {share} * min(height / rows, width / columns)
    left, top = max(0, (width - scale * columns) / 2), max(0, (height - scale * rows) / 2)
    box = (left, top, min(left + scale * columns, width), min(top + scale * rows, height))
    bands = [Image.fromarray(np.ascontiguousarray(band, np.float32)) for band in image]
    resized = np.stack([np.asarray(band.resize((columns, rows), Image.Resampling.{resample}, box)) for band in bands])
    low, high = np.array(processor.value_range, np.float32).T[:, :, None, None]
    return resized.clip(low, high)


image = tifffile.imread("image.tif")  # ({number}, height, width), values as stored
inputs = processor(prepare(image), input_data_format="channels_first", return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
{result}
```
'''


def usage(
    value_range: Sequence[Sequence[float]],
    names: Sequence[str],
    auto_class: str,
    result: str,
    share: float = 1.0,
    resample: str = "BICUBIC",
) -> str:
    """Return the usage section of a card, in which a line `checkpoint = ""` is filled in.

    Args:
        result: A line of code that reads `outputs`.
        share: Side of the central part, as a part of the largest possible one.
    """
    rows = zip(names, value_range, strict=True)
    ranges = "\n".join(f"| {escape(name)} | {low:.6g} | {high:.6g} |" for name, (low, high) in rows)
    return _USAGE.format(
        number=len(value_range),
        ranges=ranges,
        auto_class=auto_class,
        result=result,
        share=f"{share:.6g}",
        resample=resample,
    )
