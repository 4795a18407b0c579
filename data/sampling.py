"""The order in which the training loader asks for images: a counter that never repeats over the whole run."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Yields `epoch * num_images + position`; the data set turns the counter into an epoch and a shuffled image.

    The epoch travels inside the counter because a worker that outlives an epoch keeps a stale copy of the data set.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_images
        return iter(range(first, first + self.num_images))

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer and Accelerate at the start of each epoch, the resumed one included."""
        self.epoch = epoch
