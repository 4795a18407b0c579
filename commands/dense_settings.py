"""Settings that the fine-tuning tasks with masks or boxes share."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from commands.finetune_settings import FinetuneSettings
from commands.flags import Range, flag
from commands.settings import data_name

_RESIZE = Range(lambda x: len(x) == 2 and 0 < x[0] <= x[1], "two numbers, 0 < smallest <= largest")


@dataclass(frozen=True, kw_only=True)
class DenseFlags:
    title: ClassVar = "masks and boxes"

    resize_scale: tuple[float, float] = flag(
        None,
        "smallest and largest factor by which an image is resized before it is cropped (default: the recipe's)",
        _RESIZE,
    )


@dataclass(frozen=True, kw_only=True)
class DenseSettings(FinetuneSettings, DenseFlags):
    """Base class of the settings of a fine-tuning with masks or boxes."""

    def default_output_dir(self) -> str:
        start = "-scratch" if self.from_scratch else ""
        return f"outputs/{Path(self.model).name}-{self.task}-{self.mode}{start}-{data_name(self.dataset)}"
