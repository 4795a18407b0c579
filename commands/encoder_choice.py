"""The largest encoder that sees enough images in a time: of --time_budget without --model, and of --advise."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from commands.pretraining_settings import PretrainingSettings
from data.image_checks import Summary

_SHARE_OF_TRAINING = 0.85  # of the time
_ENOUGH_IMAGES, _ENOUGH_EPOCHS = 128_000, 20  # that a run should see, the larger one of both
_MOST_IMAGES = 10 * _ENOUGH_IMAGES  # of so many epochs


@dataclass(frozen=True)
class Encoder:
    """A size of `--model`, the images and patches that it is proposed with, and the images that it is meant for.

    Args:
        least_side: Of images, in pixels; smaller ones have another encoder.
        most_side: Of images, in pixels.
        is_for_cpu: Whether a step on a CPU takes no more than a few seconds.
    """

    model: str
    image_size: int
    patch_size: int
    least_side: int
    most_side: float = float("inf")
    is_for_cpu: bool = True

    @property
    def sizes(self) -> dict[str, Any]:
        """The flags of a run with this encoder."""
        return {"model": self.model, "image_size": self.image_size, "patch_size": self.patch_size}


_SMALL = 47  # pixels: of images that would only be enlarged
_ENCODERS = (  # from large to small
    Encoder("vit-base", 224, 16, 180, is_for_cpu=False),
    Encoder("vit-small", 224, 16, 180, is_for_cpu=False),
    Encoder("vit-small", 112, 8, 90, is_for_cpu=False),
    Encoder("vit-tiny", 96, 8, 80),
    Encoder("vit-nano", 64, 8, _SMALL + 1),
    Encoder("vit-small", 32, 4, 0, _SMALL, is_for_cpu=False),
    Encoder("vit-tiny", 32, 4, 0, _SMALL),
    Encoder("vit-nano", 32, 4, 0, _SMALL),
)


@dataclass(frozen=True)
class Choice:
    """An encoder, and how much of the images it sees in the time.

    Args:
        images_per_second: Of training steps on images that are there already.
        num_seen: Images in the time.
    """

    sizes: dict[str, Any]
    images_per_second: float
    num_seen: float


def choose_encoder(
    num_images: int,
    side: int,
    seconds: float,
    is_cpu: bool,
    measure: Callable[[dict[str, Any]], float],
    image_size: tuple[int, int] | None = None,
) -> Choice:
    """Return the largest encoder that sees enough images in the time, else the smallest one that suits the images.

    Args:
        side: The shortest one of the images, in pixels.
        measure: Returns the images per second of training steps with a model and sizes; 0 if they do not fit into
            memory.
        image_size: Height and width that the user wants.
    """
    enough = max(_ENOUGH_IMAGES, min(_ENOUGH_EPOCHS * num_images, _MOST_IMAGES))
    for sizes in _suited(min(image_size) if image_size else side, is_cpu, image_size):
        speed = measure(sizes)
        choice = Choice(sizes, speed, speed * _SHARE_OF_TRAINING * seconds)
        if choice.num_seen >= enough:
            break
    return choice


def _suited(side: int, is_cpu: bool, image_size: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    for encoder in _ENCODERS:
        if not encoder.least_side <= side <= encoder.most_side or (is_cpu and not encoder.is_for_cpu):
            continue
        if image_size is None:
            yield encoder.sizes
        else:  # with about as many patches on a side
            wanted = side * encoder.patch_size / encoder.image_size
            fitting = [n for n in range(1, side + 1) if not (image_size[0] % n or image_size[1] % n)]
            patch_size = min(fitting, key=lambda n: abs(math.log(n / wanted)))
            yield encoder.sizes | {"image_size": list(image_size), "patch_size": patch_size}


def shortest_side(settings: PretrainingSettings, summary: Summary) -> int:
    """Return the shortest side of the median image, or of its tiles."""
    return min(summary.width.median, summary.height.median, *([settings.tile] if settings.tile else []))
