"""Parts of self-distillation: projection head, prototypes, centering, Sinkhorn-Knopp, and the losses.

Papers: Caron et al. 2021 (DINO), arXiv:2104.14294, Sec. 3.1; Zhou et al. 2021 (iBOT), arXiv:2111.07832, Sec. 3; Oquab
et al. 2023 (DINOv2), arXiv:2304.07193, Sec. 4; Caron et al. 2020 (SwAV), arXiv:2006.09882, Sec. 3 (Sinkhorn-Knopp);
Sablayrolles et al. 2018, arXiv:1806.03198 (KoLeo); Wu et al. 2025 (SimDINO), arXiv:2502.10385, Sec. 3 (coding rate);
Siméoni et al. 2025 (DINOv3), arXiv:2508.10104, Sec. 4 (Gram matrices).
Code: facebookresearch/dino at 7c446df; bytedance/ibot at da316d8; facebookresearch/dinov2 at e1277af.
Shapes: B images, S crops that the student sees, T crops that the teacher sees (the first T of the S), R = B * T masks,
N patches, M masked patches in the batch, D width, E bottleneck, K prototypes.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import initialization as init

from .ema import full_precision
from .processes import over_processes, own_share


class ProjectionHead(nn.Module):
    """An MLP to a bottleneck of unit length."""

    def __init__(self, width: int, hidden_size: int, bottleneck_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, bottleneck_size),
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as the authors do."""
        for linear in self.mlp:
            if isinstance(linear, nn.Linear):
                init.trunc_normal_(linear.weight, std=0.02)
                init.zeros_(linear.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., E), of unit length."""
        return self.project(tokens)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., E), of unit length."""
        return nn.functional.normalize(self.mlp(tokens), dim=-1, eps=1e-6)


class PrototypeHead(ProjectionHead):
    """A projection head and its cosine similarities to prototypes.

    Args:
        trains_scale: Whether the similarities have a trained factor for each prototype (`norm_last_layer` False in
            the authors' code).
    """

    def __init__(
        self, width: int, hidden_size: int, bottleneck_size: int, num_prototypes: int, trains_scale: bool = False
    ):
        super().__init__(width, hidden_size, bottleneck_size)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_size))
        if trains_scale:
            self.scale = nn.Parameter(torch.empty(num_prototypes, 1))
        else:
            self.register_buffer("scale", torch.ones(num_prototypes, 1))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the prototypes as PyTorch's Linear, with scale 1."""
        super().init_weights()
        bound = self.prototypes.shape[1] ** -0.5
        init.uniform_(self.prototypes, -bound, bound)
        init.ones_(self.scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the similarities of tokens (..., D) to the prototypes, (..., K)."""
        return self.compare(self.project(tokens))

    def compare(self, features: torch.Tensor) -> torch.Tensor:
        """(..., E) -> (..., K); linear, so that a mean of similarities is the similarity of the mean."""
        return nn.functional.linear(features, nn.functional.normalize(self.prototypes, dim=-1) * self.scale)


class Center(nn.Module):
    """A running mean of the teacher's similarities, which are centered by it so that no prototype dominates.

    `add` what the micro-batches of an optimizer step hold, then `update` once, with the mean over all of them and over
    all processes.
    """

    mean: torch.Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_prototypes))
        # Not buffers, which DDP would overwrite by those of the first process.
        self._sum: torch.Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(self, mean: torch.Tensor, count: int) -> None:
        """Take in the mean similarity (K,) of `count` tokens."""
        share = mean.float() * count
        self._sum = share if self._sum is None else self._sum + share
        self._count += count

    @torch.no_grad()
    def update(self) -> None:
        """Move the center."""
        if self._sum is None:
            return
        total = over_processes(torch.cat([self._sum, torch.full_like(self._sum[:1], self._count)]), "sum")
        # Without a token in any process it stays.
        new = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1), self.mean)
        self.mean.lerp_(new, 1 - self.momentum)
        self._sum, self._count = None, 0

    def forward(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the distributions of centered similarities (n, K), float32."""
        return ((logits.float() - self.mean) / temperature).softmax(dim=-1)


@torch.no_grad()
def sinkhorn_knopp(logits: torch.Tensor, temperature: float, num_iterations: int = 3) -> torch.Tensor:
    """Return distributions (n, K) in which, over all processes, all prototypes have the same share.

    Rows and columns are normalized in turn; factors common to the whole matrix cancel.
    """
    scores = logits.float() / temperature
    # Their largest is such a factor, and keeps exp finite; differences beyond 60 are none of cosine similarities.
    largest = scores.amax() if len(scores) else scores.new_full((), -torch.inf)
    shares = (scores - over_processes(largest, "max")).clamp(min=-60).exp()
    for _ in range(num_iterations):
        shares = shares / over_processes(shares.sum(dim=0), "sum").clamp(min=1e-30)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def class_token_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean cross entropy of the student's crops (B, S, K) with the teacher's other crops (B, T, K).

    Similarities of the student, distributions of the teacher; no crop is compared with itself.
    """
    return agreement_loss((student.float() / temperature).log_softmax(dim=-1), teacher)


def agreement_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the negative mean inner product of crops (B, S, K) and other crops (B, T, K) of the same images.

    No crop is compared with itself.
    """
    with full_precision(student.device):
        terms = -(teacher.float() @ student.float().transpose(1, 2)).mean(dim=0)  # (T, S)
    num_teacher, num_student = terms.shape
    same = torch.eye(num_teacher, num_student, dtype=torch.bool, device=terms.device)
    return terms.masked_fill(same, 0).sum() / (num_teacher * num_student - num_teacher)


def coding_rate(features: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the mean coding rate of the views (B, T, E) of images: large if those of different images are far apart.

    It is half of log det(I + E / (B eps) Z Z^T) for the features Z of a view, times the authors' (E + B) / (E B).
    """
    num_images, _, width = features.shape
    views = features.float().transpose(0, 1)  # (T, B, E)
    with full_precision(features.device):  # else rounding makes the matrix of nearly equal features indefinite
        gram = views @ views.transpose(1, 2) * (width / (num_images * eps))  # (T, B, B)
    matrix = gram + torch.eye(num_images, device=gram.device)
    log_det: torch.Tensor = 2 * torch.linalg.cholesky_ex(matrix)[0].diagonal(dim1=1, dim2=2).log().sum(dim=1)  # (T,)
    rate: torch.Tensor = log_det.mean() * (width + num_images) / (2 * width * num_images)
    return rate


def patch_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, masks: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Return the cross entropy of masked patches (M, K), averaged within each mask and then over all of them.

    A crop without masked patches counts as 0.

    Args:
        masks: (R, N), True = masked.
        masked: (M,), indices of the masked patches in the flattened masks.
    """
    cross_entropy = -(teacher * (student.float() / temperature).log_softmax(dim=-1)).sum(dim=-1)  # (M,)
    share = 1 / masks.sum(dim=1).clamp(min=1)  # (R,)
    return (cross_entropy * share[masked // masks.shape[1]]).sum() / len(masks)


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """Return the Kozachenko-Leonenko estimate of the negative entropy of features (B, D) on the sphere.

    It is low if no two images are close to each other.
    """
    eps = 1e-8
    features = nn.functional.normalize(features.float(), dim=-1, eps=eps)
    with torch.no_grad(), full_precision(features.device):
        similarity = features @ features.T
        nearest = similarity.fill_diagonal_(-1).argmax(dim=1)  # (B,)
    distance = nn.functional.pairwise_distance(features, features[nearest], eps=eps)
    return -(distance + eps).log().mean()


def gram_loss(student: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of the cosine similarities between the patches of each crop, both (R, N, D)."""
    with full_precision(student.device):
        ours, theirs = (nn.functional.normalize(patches.float(), dim=-1) for patches in (student, anchor))
        return nn.functional.mse_loss(ours @ ours.mT, theirs @ theirs.mT)


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale the gradient of each tensor by itself to a norm of at most `max_norm`, without waiting for the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shares = [own_share(gradient) for gradient in gradients]
    norms = torch.stack(torch._foreach_norm(shares))
    if any(share is not gradient for share, gradient in zip(shares, gradients, strict=True)):
        norms = over_processes(norms.square(), "sum").sqrt()
    torch._foreach_mul_(shares, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())
