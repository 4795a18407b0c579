"""A codebook of unit vectors that follows what it encodes: a moving average in place of a gradient.

Papers: van den Oord et al. 2017 (VQ-VAE), arXiv:1711.00937, App. A.1 (moving average); Peng et al. 2022 (BEiT v2),
arXiv:2208.06366, Sec. 2.2.
Code: microsoft/unilm/beit2/norm_ema_quantizer.py at 768a3c8.
Differs: the sums of a step are taken over all of its micro-batches, and the codebook moves once, after the step. All
processes start from one k-means; the authors' start from one each.
Shapes: n features, K codes, E width, R codes that may restart in a step.
"""

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import initialization as init

from .ema import full_precision
from .processes import gathered, over_processes

# A code is dead if it occurs less than this share as often as the average one. At most so many restart in a step.
_DEAD_SHARE, _MAX_RESTARTS = 0.01, 32


class EmaCodebook(nn.Module):
    """Codes of unit length, each a moving average of the features whose nearest code it is.

    In training mode, `forward` takes in the features; `update` moves the codes, after each optimizer step. The codes
    are in a buffer, so that no optimizer, weight decay or weight average touches them.

    Args:
        decay: Of codes and counts in a step.
        restarts_dead_codes: Whether codes that hardly occur take the place of the features farthest from their code.
            Not in the published method.
    """

    codes: Tensor
    counts: Tensor  # (K,), how often each occurs in a step, as a moving average

    def __init__(self, num_codes: int, width: int, decay: float = 0.99, restarts_dead_codes: bool = False):
        super().__init__()
        self.decay, self.restarts_dead_codes = decay, restarts_dead_codes
        self.register_buffer("codes", torch.zeros(num_codes, width))
        self.register_buffer("counts", torch.zeros(num_codes))
        # Not buffers, which DDP would overwrite by those of the first process, and empty at every checkpoint.
        self._sums: Tensor | None = None  # (K, E+1), of features and their number
        self._farthest: Tensor | None = None  # (R, E+1), features and their distance

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw codes that are spread evenly over the sphere."""
        init.copy_(self.codes, F.normalize(torch.randn_like(self.codes), dim=-1))
        init.zeros_(self.counts)

    @torch.no_grad()
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices (..., int64) of the nearest codes of unit features (..., E), and these codes (..., E)."""
        indices = self.nearest(features)
        found = self.codes[indices]
        if self.training:
            self._take_in(features.flatten(0, -2), indices.flatten(), found.flatten(0, -2))
        return indices, found

    def nearest(self, features: Tensor) -> Tensor:
        """Return the indices (..., int64) of the nearest codes of unit features (..., E)."""
        with full_precision(features.device):
            squared = self.codes.square().sum(1) - 2 * features.float() @ self.codes.T  # (..., K), less 1
        return squared.argmin(dim=-1)

    def _take_in(self, features: Tensor, indices: Tensor, found: Tensor) -> None:
        """Add features (n, E), the indices of their codes (n,) and these codes (n, E)."""
        ones = torch.ones_like(features[:, :1])
        sums = torch.zeros(len(self.codes), features.shape[1] + 1, device=features.device)
        sums.index_add_(0, indices, torch.cat([features, ones], dim=1))
        self._sums = sums if self._sums is None else self._sums + sums
        if self.restarts_dead_codes:
            distances = (features - found).square().sum(1, keepdim=True)
            self._farthest = _farthest(torch.cat([features, distances], dim=1), self._farthest)

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes towards the mean of their features in all processes; unused ones stay."""
        if self._sums is None:
            return
        total = over_processes(self._sums, "sum")
        sums, counts = total[:, :-1], total[:, -1]
        means = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), self.codes)  # a mean of the same direction
        self.codes.copy_(F.normalize(self.codes.lerp(means, 1 - self.decay), dim=-1))
        self.counts.lerp_(counts, 1 - self.decay)
        if self._farthest is not None:
            self._restart(_farthest(gathered(self._farthest)))
        self._sums = self._farthest = None

    def _restart(self, farthest: Tensor) -> None:
        """Give the rarest of the dead codes the features (R, E+1), without a branch that waits for the device."""
        farthest = farthest[: len(self.codes)]
        rarest = self.counts.argsort(stable=True)[: len(farthest)]
        mean = self.counts.mean()
        is_dead = self.counts[rarest] < _DEAD_SHARE * mean  # (R,)
        self.codes[rarest] = torch.where(is_dead[:, None], farthest[:, :-1], self.codes[rarest])
        self.counts[rarest] = torch.where(is_dead, mean, self.counts[rarest])

    @torch.no_grad()
    def start(self, features: Tensor, generator: torch.Generator) -> None:
        """Start from the k-means of unit features (n, E) of the first process.

        Raises:
            ValueError: If there are fewer features than codes.
        """
        if len(features) < len(self.codes):
            raise ValueError(
                f"the images have only {len(features):,} patches to start {len(self.codes):,} codes from: give more "
                "images, lower vocab_size, or set start_from_images to false"
            )
        codes, counts = spherical_kmeans(features, len(self.codes), generator)
        for buffer, value in ((self.codes, codes), (self.counts, counts)):
            buffer.copy_(value)
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast(buffer, src=0)


@torch.no_grad()
def spherical_kmeans(
    features: Tensor, num_codes: int, generator: torch.Generator, num_iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Return codes (K, E) of unit length, and how many of the unit features (n, E) were nearest to each (K,)."""
    features = features.float()
    chosen = torch.randperm(len(features), generator=generator)[:num_codes]
    codes, counts = features[chosen.to(features.device)], features.new_zeros(num_codes)
    for _ in range(num_iterations):
        indices = torch.cat([(part @ codes.T).argmax(dim=1) for part in features.split(4096)])
        counts = features.new_zeros(num_codes).index_add_(0, indices, features.new_ones(len(features)))
        sums = torch.zeros_like(codes).index_add_(0, indices, features)
        codes = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), codes)
    return codes, counts


def _farthest(*candidates: Tensor | None) -> Tensor:
    """Return the rows (R, E+1) with the largest last number of all candidates, the same however these are split."""
    rows = torch.cat([part for part in candidates if part is not None])
    return rows[rows[:, -1].argsort(descending=True, stable=True)[:_MAX_RESTARTS]]
