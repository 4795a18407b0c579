"""Settings that the fine-tuning tasks with masks or boxes share."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from commands.finetune_settings import FinetuneSettings
from commands.flags import COUNT, Range, flag
from commands.settings import SettingsError, data_name

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

    default_batch_size: ClassVar = 16
    published_batch: ClassVar = 16

    per_device_train_batch_size: int | Literal["auto"] = flag(
        help="images per device and forward pass, or auto for the largest number that fits into its memory "
        "(default: 16)",
        within=COUNT,
        words=("auto",),
    )
    crop_scale: tuple[float, float] | None = flag(  # type: ignore[assignment]
        None, "no effect with masks or boxes; see --resize_scale"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_scale is not None:
            raise SettingsError("--crop_scale has no effect with masks or boxes; --resize_scale chooses the crops")

    def default_output_dir(self) -> str:
        start = "-scratch" if self.from_scratch else ""
        return f"outputs/{Path(self.model).name}-{self.task}-{self.mode}{start}-{data_name(self.dataset)}"
