"""Texts, and images with texts, as they are stored: text files, tables, or a folder with a file of captions.

A text that is empty, missing or not UTF-8 is left out, and named in `bad`.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from data.bad_images import BadImages
from data.image_checks import Checks, check_images
from data.image_source import FileSource, ImageSource, TableSource, join_sources
from data.images import SourceSamples, split_validation
from data.sources import open_source
from data.tables import TABLE_EXTENSIONS, load_tables

# Names used by datasets on the Hub, by priority.
TEXT_COLUMNS = ("text", "caption", "captions", "sentence", "sentences", "description", "title")
FILE_COLUMNS = ("file_name", "image", "image_path", "path", "file", "filename")
_CAPTION_FILES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv", "pairs.jsonl", "pairs.csv")
_LINES, _RECORDS = (".txt",), (".jsonl", ".csv")
_NOT_UTF8 = "its text is not UTF-8"


@dataclass(frozen=True)
class Texts(Sequence[str]):
    """Texts with the name of each, in one arrow array, which worker processes share instead of copying."""

    values: pa.LargeStringArray
    names: pa.LargeStringArray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index].as_py()

    def name(self, index: int) -> str:
        return str(self.names[index].as_py())

    def select(self, positions: np.ndarray) -> "Texts":
        """Return the texts at these positions."""
        return Texts(self.values.take(pa.array(positions)), self.names.take(pa.array(positions)))

    @property
    def numbers_of_names(self) -> np.ndarray:
        """The number of each name among the different ones, in the order in which they first occur."""
        return np.asarray(self.names.dictionary_encode().indices)

    def split(self, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions for training and validation; those of one name, as of an image, stay together."""
        numbers = self.numbers_of_names
        _, validation = split_validation(int(numbers.max()) + 1, fraction, seed)
        is_held_out = np.isin(numbers, validation)
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


@dataclass(frozen=True)
class Pairs:
    """Readable images, with the caption of each."""

    images: SourceSamples
    captions: Texts

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, positions: np.ndarray) -> "Pairs":
        """Return the pairs at these positions."""
        return Pairs(self.images.select(positions), self.captions.select(positions))


def open_texts(dataset: Sequence[str], max_bad_fraction: float) -> tuple[Texts, BadImages]:
    """Open text files (one text per line), jsonl, csv, parquet or arrow files, folders of these, or Hub ids.

    Returns the usable texts and, by name, why others are left out.

    Raises:
        ValueError: If there is no such dataset, it has no texts, or too many of them cannot be used.
    """
    return _usable((row for name in dataset for row in _rows_of(name)), " + ".join(dataset), max_bad_fraction)


def open_pairs(dataset: Sequence[str], max_bad_fraction: float, checks: Checks = "new") -> tuple[Pairs, BadImages]:
    """Open folders with a file of captions beside the images, or tables and Hub ids with an image and a text column.

    Returns the usable pairs and, by name, why others are left out.

    Raises:
        ValueError: If there is no such dataset, it has no pairs, or too many of them cannot be used.
    """
    opened = [_open_pairs(name) for name in dataset]
    source = join_sources([source for source, _ in opened])
    captions = [caption for _, of_one in opened for caption in of_one]
    checked = check_images(source, max_bad_fraction, checks=checks)
    good = np.asarray(checked.good)
    rows = ((source.name(index), captions[index]) for index in good.tolist())
    texts, bad_texts = _usable(rows, " + ".join(dataset), max_bad_fraction)
    is_good = [_problem_with(captions[index]) is None for index in good.tolist()]
    images = SourceSamples(source, good[np.array(is_good, bool)])
    return Pairs(images, texts), BadImages(checked.bad | bad_texts)


def too_long(texts: Texts, num_words: int) -> str | None:
    """Return a note about texts with more words than that, of which the rest is not seen; None if there are none."""
    long = {index: length for index, text in enumerate(texts) if (length := len(text.split())) > num_words}
    if not long:
        return None
    first = next(iter(long))
    return (
        f"{len(long):,} {'text is' if len(long) == 1 else 'texts are'} cut to max_text_length {num_words}, such as "
        f"{texts.name(first)} with {long[first]:,} words"
    )


def _problem_with(text: Any) -> str | None:
    if text is None or text == "" or (isinstance(text, str) and not text.strip()):
        return "its text is empty"
    if not isinstance(text, str):
        return f"its text is {text!r:.40}, expected a string"
    # bytes that are not UTF-8 were decoded to lone surrogates; UTF-16 has zeros
    return _NOT_UTF8 if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in text) else None


def _first(text: Any) -> Any:
    """Return the first of several texts."""
    return text[0] if isinstance(text, list) and text else text


def _usable(rows: Iterator[tuple[str, Any]], title: str, max_bad_fraction: float) -> tuple[Texts, BadImages]:
    names: list[str] = []
    values: list[str] = []
    bad = BadImages()
    for position, (name, text) in enumerate(rows):
        if problem := _problem_with(text):
            bad[f"{name} (row {position})" if name in bad else name] = problem  # an image may have several texts
        else:
            names.append(name.encode(errors="backslashreplace").decode())  # a file name need not be Unicode
            values.append(text.strip())
    num_texts = len(values) + len(bad)
    if not values or len(bad) > max_bad_fraction * num_texts:
        raise ValueError(
            f"{len(bad):,} of {num_texts:,} texts of {title} cannot be used (max_bad_fraction is {max_bad_fraction:g})"
            + (f": {bad.describe()}" if bad else "; expected a line or a row for each text")
        )
    return Texts(pa.array(values, pa.large_string()), pa.array(names, pa.large_string())), bad


def _rows_of(dataset: str) -> Iterator[tuple[str, Any]]:
    """Yield name and text of each text of a dataset."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        endings = (*_LINES, *_RECORDS, *sorted(TABLE_EXTENSIONS))
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise ValueError(f"no texts in {path}; expected files that end in {', '.join(endings)}")
        for file in files:
            yield from _rows_of(str(file))
    elif path.suffix.lower() in _LINES and path.is_file():
        # not splitlines(), which also ends a line at a form feed or at U+2028
        lines = io.StringIO(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"), newline=None)
        yield from ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    elif path.suffix.lower() in _RECORDS and path.is_file():
        records, names = _read_records(path)
        yield from zip(names, _column(records, TEXT_COLUMNS, str(path), "text"), strict=True)
    elif path.is_file() and path.suffix.lower() not in TABLE_EXTENSIONS:
        endings = (*_LINES, *_RECORDS, *sorted(TABLE_EXTENSIONS))
        raise ValueError(f"{path} holds no texts that can be read; expected a file that ends in {', '.join(endings)}")
    else:
        table = load_tables([path]) if path.is_file() else _load_from_hub(dataset)
        yield from _table_rows(table, dataset)


def _table_rows(table: datasets.Dataset, title: str) -> Iterator[tuple[str, Any]]:
    column = _find_column(list(table.features), TEXT_COLUMNS, title, "text")
    table = table.select_columns([column])  # images would be read, and decoded
    for start in range(0, len(table), 1000):
        for index, text in enumerate(table[start : start + 1000][column], start=start):
            yield f"{title}#{index}", _first(text)


def _load_from_hub(dataset: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(dataset, split="train")
    except Exception as error:  # the Hub's client raises a dozen types from three libraries
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"dataset {dataset!r} is neither a file or folder nor on the Hub ({reason})") from error


def _open_pairs(dataset: str) -> tuple[ImageSource, list[Any]]:
    path = Path(dataset).expanduser()
    if path.is_dir():
        file = next((path / name for name in _CAPTION_FILES if (path / name).is_file()), None)
        if file is not None:
            records, _ = _read_records(file)
            files = _column(records, FILE_COLUMNS, str(file), "file")
            paths = pa.array([os.fsencode(str(name)) for name in files], pa.large_binary())
            source = FileSource(paths, os.fsencode(path), f"{file}: {len(paths):,} images with captions", file)
            return source, _column(records, TEXT_COLUMNS, str(file), "text")
        if not any(path.rglob("*.parquet")) and not any(path.rglob("*.arrow")):
            raise ValueError(f"no captions in {path}; expected one of {', '.join(_CAPTION_FILES)} beside the images")
    images = open_source(dataset)
    captions: list[Any] = []
    for part in images.parts:
        if not isinstance(part, TableSource):
            raise ValueError(f"{part.describe()} has no captions; expected one of {', '.join(_CAPTION_FILES)}")
        captions += [text for _, text in _table_rows(part.table, dataset)]
    return images, captions


def _read_records(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records of a jsonl or csv file, and the name of each; bytes that are not UTF-8 become surrogates."""
    content = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(content, newline=""))
        try:
            csv_records = [(reader.line_num, record) for record in reader]
        except csv.Error as error:
            raise ValueError(
                f"{file}:{reader.reader.line_num} is not a row of a csv file ({error}); is a quote not closed?"
            ) from None
        for number, record in csv_records:
            if any(record.pop(None, ())):  # type: ignore[call-overload]  # what DictReader has no column for
                raise ValueError(
                    f"{file}:{number} has more values than the {len(record)} columns of the first line: put texts "
                    'with commas in quotes, "like, this"'
                )
        return [record for _, record in csv_records], [f"{file}:{number}" for number, _ in csv_records]
    records, names = [], []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}:{number} is not a JSON object ({error})") from None
        names.append(f"{file}:{number}")
    return records, names


def _column(records: Sequence[dict[str, Any]], known: Sequence[str], title: str, what: str) -> list[Any]:
    names = list(dict.fromkeys(name for record in records for name in record))
    column = _find_column(names, known, title, what)
    return [_first(record.get(column)) for record in records]


def _find_column(names: Sequence[str], known: Sequence[str], title: str, what: str) -> str:
    for name in known:
        if name in names:
            return name
    raise ValueError(
        f"no {what} column in {title}, which has {', '.join(map(str, names)) or 'nothing'}; "
        f"expected one of {', '.join(known)}"
    )
