"""What the evaluations of frozen features write and print: metrics.json, facts about the setup, and progress."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from commands.evaluation_settings import EvaluationSettings
from commands.output_folder import check_output_dir
from data.bad_images import BadImages
from evaluation.features import FrozenEncoder
from evaluation.preprocessing import Batch, Preprocessor
from hub.redaction import shorten_command, shorten_paths
from training.callbacks import duration

METRICS_FILE, REPORT_FILE, MAPS_FILE = "metrics.json", "report.html", "feature_maps.png"
_WRITTEN_BY = "run_evaluation.py"
MAX_BAD_FRACTION = 0.05


class EvaluationOutput:
    """The output folder of an evaluation; raises ValueError if it holds another command's results.

    Args:
        argv: The command line, for the report.
    """

    def __init__(self, settings: EvaluationSettings, argv: Sequence[str]) -> None:
        self.settings, self.started, self.bad = settings, time.perf_counter(), BadImages()
        self.model, self.dataset = short_name(settings.model), "-".join(map(short_name, settings.dataset))
        self.command = shorten_command(shlex.join(["python", _WRITTEN_BY, *argv]))
        self.folder = Path(settings.output_dir or f"outputs/evaluation-{self.model}-{self.dataset}")
        check_output_dir(self.folder)
        file = self.folder / METRICS_FILE
        if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("written_by") != _WRITTEN_BY:
            raise ValueError(
                f"{file} was not written by {_WRITTEN_BY} and is not overwritten: use another --output_dir"
            )

    def check_bad(self, num_images: int) -> None:
        """Raise ValueError if too many images could not be read."""
        if len(self.bad) > MAX_BAD_FRACTION * num_images:
            skipped = shorten_paths(self.bad.describe())
            raise ValueError(f"{len(self.bad)} of {num_images} images cannot be read: {skipped}")

    def facts(
        self, encoder: FrozenEncoder, preprocessor: Preprocessor, size: Sequence[int], tested_on: str
    ) -> dict[str, Any]:
        """Return facts about encoder, images of `size` (height, width) and software for the report."""
        num_parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
        processor = type(preprocessor.processor).__name__.removesuffix("Pil")
        software = [f"{name} {version(name)}" for name in ("transformers", "torch")]
        skipped = f"{len(self.bad)} images that cannot be read: {shorten_paths(self.bad.describe())}"
        pixels = f"{' x '.join(map(str, size))} pixels, no augmentation"
        prepared = f"prepared by the encoder's {processor}"
        if preprocessor.value_range is not None:
            prepared = f"{preprocessor.num_channels} channels, cut off at the range of each"
        return {
            "encoder": f"{encoder.config.model_type}, {num_parameters / 1e6:,.1f} million parameters",
            "images": f"{prepared}, {pixels}",
            "software": ", ".join([*software, f"Python {platform.python_version()}"]),
            "date": date.today().isoformat(),
            "tested on": tested_on,
            "left out": skipped if self.bad else "no image",
            "seed": self.settings.seed,
            "time": duration(time.perf_counter() - self.started),
        }

    def write(self, content: dict[str, Any], figures: dict[str, Image.Image]) -> None:
        """Write metrics.json and the figures by file name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.save(self.folder / name, optimize=True)
        file = self.folder / METRICS_FILE
        scratch = self.folder / f"{METRICS_FILE}.part"
        about = {"model": self.model, "command": self.command, "written_by": _WRITTEN_BY}
        text = json.dumps(content | about, indent=2, ensure_ascii=False) + "\n"
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        scratch.replace(file)


def with_progress(images: Iterator[Batch], num_images: int, name: str) -> Iterator[Batch]:
    """Yield the images with a progress bar in a terminal, and print the speed at the end."""
    started = time.perf_counter()
    with tqdm(total=num_images, desc=name, unit="image", disable=not sys.stderr.isatty()) as bar:
        for batch in images:
            yield batch
            bar.update(len(batch.positions))
    seconds = time.perf_counter() - started
    print(f"{num_images:,} {name} in {duration(seconds)}, {num_images / seconds:,.0f} images/s", file=sys.stderr)


def short_name(name: str) -> str:
    """Return the last folder of a path; Hub ids and names of bundled datasets are kept."""
    return Path(name).resolve().name if Path(name).exists() else shorten_paths(name).replace("/", "-")
