"""MIM-Refiner: contrastive heads on the last blocks of a trained encoder, whose positives are nearest neighbors.

Papers: Alkin et al. 2024, "MIM-Refiner: A Contrastive Learning Boost from Intermediate Pre-Trained Representations",
arXiv:2402.10093, Sec. 4; Dwibedi et al. 2021 (NNCLR), arXiv:2104.14548, Sec. 3.
Code: ml-jku/MIM-Refiner at cc57423.
The encoder waits until the heads are trained by `head_warmup_epochs` of the training.
Differs: The heads have 20 candidates for a neighbor from the start, there one until the encoder trains too. Heads have
no weight decay, there 1e-5, and the projector's last norm no weights. The size of the queue, and with it the number of
candidates, follows the number of images unless given. The loss is the mean over heads, there their sum. In its terms
for local crops the authors' code takes the first L of all crops, the key's own among them; here the local ones.
Shapes: B images with T = 2 global and L local crops each, S = T + L, A images of all processes, C channels, H W and
h w pixels, D width, E features of a head, Q of them in the queue.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .base import MimOutput, MimPreTrainedModel, Paper, mean_metric
from .ema import full_precision
from .encoders import VitEncoder
from .feature_panel import feature_panel
from .multi_crop import CropsConfig
from .processes import BatchNorm, gathered, this_process
from .schedules import Progress

_LARGEST_QUEUE, _MOST_CANDIDATES, _ROWS_PER_CANDIDATE = 65_536, 20, 50


@strict
class RefineConfig(CropsConfig):
    """Configuration of a refinement, with the settings of `CropsConfig`.

    Args:
        num_refined_blocks: Last blocks with a head each; 0 for a third of them (the paper's 8 of ViT-L), at least 2.
        queue_size: Features of earlier images among which neighbors are found; 0 for 65,536, in a run for the largest
            power of two up to the number of images, if that is less.
        num_candidates: Nearest neighbors of which one is drawn; 0 for 20, or less in a queue of less than 1,000.
        temperature: Divisor of the similarities.
    """

    model_type = "mim_refine"
    paper: ClassVar[Paper | None] = Paper(
        "MIM-Refiner: A Contrastive Learning Boost from Intermediate Pre-Trained Representations",
        "Benedikt Alkin and Lukas Miklautz and Sepp Hochreiter and Johannes Brandstetter",
        2024,
        "2402.10093",
    )
    mask_probability: ClassVar[float] = 0.0
    needs_trained_encoder: ClassVar[bool] = True
    settings_fixed_by_weights: ClassVar[tuple[str, ...]] = ("head_hidden", "head_bottleneck", "num_refined", "queue")

    num_refined_blocks: int = 0
    queue_size: int = 0
    num_candidates: int = 0
    temperature: float = 0.2
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        num_blocks = self.encoder_config.num_hidden_layers
        self.num_refined_blocks = self.num_refined_blocks or min(num_blocks, max(2, num_blocks // 3))
        self.queue_size = self.queue_size or _LARGEST_QUEUE
        self.num_candidates = self.num_candidates or min(_MOST_CANDIDATES, -(-self.queue_size // _ROWS_PER_CANDIDATE))
        if not 1 <= self.num_refined_blocks <= num_blocks:
            raise ValueError(
                f"num_refined_blocks is {self.num_refined_blocks}, expected 1 to {num_blocks}, the encoder's blocks, "
                "or 0 to choose it"
            )
        if not 1 <= self.num_candidates <= self.queue_size:
            raise ValueError(
                f"num_candidates is {self.num_candidates}, expected 1 to {self.queue_size} (queue_size), or 0 to "
                "choose it"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected above 0")

    @classmethod
    def settings_for(cls, num_images: int) -> dict[str, Any]:
        """Return the size of the queue, in which no image is its own neighbor."""
        return {"queue_size": min(_LARGEST_QUEUE, max(64, 2 ** num_images.bit_length() // 2))}


class NeighborQueue(nn.Module):
    """Features of earlier images (Q, E), the same on all processes.

    `add` the images of each micro-batch of an optimizer step, then `update` once. Until it is full it has noise.
    """

    features: torch.Tensor  # (Q, E)
    image_index: torch.Tensor  # (Q,), -1 if unknown
    position: torch.Tensor  # of the oldest one

    def __init__(self, size: int, num_features: int):
        super().__init__()
        self.register_buffer("features", torch.zeros(size, num_features))
        self.register_buffer("image_index", torch.full((size,), -1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        # Not buffers, which DDP would overwrite by those of the first process.
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill the queue with noise."""
        init.normal_(self.features)
        init.constant_(self.image_index, -1)
        init.zeros_(self.position)

    @torch.no_grad()
    def nearest(self, keys: torch.Tensor, image_index: torch.Tensor | None, num_candidates: int) -> torch.Tensor:
        """Return one of the nearest neighbors of each of the keys (B, T, E), in evaluation the nearest.

        Args:
            image_index: (B,), of images that are no neighbors of themselves.
        """
        similarities = keys @ nn.functional.normalize(self.features, dim=-1).T  # (B, T, Q)
        if image_index is not None:
            is_same = (image_index[:, None] == self.image_index)[:, None]  # (B, 1, Q)
            similarities = similarities.masked_fill(is_same, -1)
        num_candidates = num_candidates if self.training else 1
        candidates = similarities.topk(num_candidates, dim=-1).indices  # (B, T, k)
        chosen = torch.zeros_like(candidates[..., :1])
        if num_candidates > 1:
            chosen = torch.randint_like(chosen, num_candidates)
        return nn.functional.normalize(self.features[candidates.gather(-1, chosen)[..., 0]], dim=-1)  # (B, T, E)

    @torch.no_grad()
    def add(self, keys: torch.Tensor, image_index: torch.Tensor | None) -> None:
        """Take in one key for each image, (B, E)."""
        unknown = torch.full((len(keys),), -1, device=keys.device)
        self._new.append((keys, unknown if image_index is None else image_index.to(keys.device)))

    @torch.no_grad()
    def update(self) -> None:
        """Replace the oldest features by those of the last step, of all processes."""
        if not self._new:
            return
        keys, image_index = (gathered(torch.cat(part))[-len(self.features) :] for part in zip(*self._new, strict=True))
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.features)
        self.features[rows], self.image_index[rows] = keys, image_index
        self.position.copy_((self.position + len(keys)) % len(self.features))
        self._new = []


class NeighborHead(nn.Module):
    """Projector, predictor and queue for the class token of one block (NNCLR, Sec. 3.2)."""

    def __init__(self, config: RefineConfig):
        super().__init__()
        width, hidden, num_features = (
            config.encoder_config.hidden_size,
            config.head_hidden_size,
            config.head_bottleneck_size,
        )
        self.projector = nn.Sequential(
            *_layer(width, hidden),
            *_layer(hidden, hidden),
            nn.Linear(hidden, num_features, bias=False),
            # The predictor's first norm removes a bias here, which Adam would move by rounding errors only.
            BatchNorm(num_features, affine=False),
        )
        self.predictor = nn.Sequential(
            *_layer(num_features, 2 * hidden), nn.Linear(2 * hidden, num_features, bias=False), BatchNorm(num_features)
        )
        self.queue = NeighborQueue(config.queue_size, num_features)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize as the authors do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
        self.queue.init_weights()

    def forward(self, class_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, D) -> projections and predictions (B, S, E) of unit length."""
        projected = self.projector(class_tokens.flatten(0, 1))
        both = (projected, self.predictor(projected))
        projections, predictions = (nn.functional.normalize(part.float(), dim=-1) for part in both)
        return projections.view(*class_tokens.shape[:2], -1), predictions.view(*class_tokens.shape[:2], -1)


def _layer(num_inputs: int, num_outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(num_inputs, num_outputs, bias=False), BatchNorm(num_outputs), nn.GELU()


class RefineForPreTraining(MimPreTrainedModel):
    """An encoder with a head on each of its last blocks (Fig. 4); nothing is masked."""

    config: RefineConfig
    encoder: VitEncoder
    predicts_patches = False
    panel_caption = "What the encoder represents: input, attention of its class token, principal components of patches"
    # The heads' first norms remove it.
    frozen_parameters = ("encoder.layernorm.bias",)
    _no_split_modules = ["ViTLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: RefineConfig):
        super().__init__(config)
        self.encoder = VitEncoder(config.encoder_config, config.drop_path_rate, use_mask_token=False)
        self.heads = nn.ModuleList(NeighborHead(config) for _ in range(config.num_refined_blocks))
        of_heads = (f"heads.{name}" for name, _ in self.heads.named_parameters())
        self.no_weight_decay = (*self.encoder.no_weight_decay, *of_heads)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NeighborHead):
            module.init_weights()

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        image_index: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Contrast crops with the nearest neighbors of other crops; nothing is masked.

        Args:
            pixel_values: (B, T, C, H, W), the global crops, uint8 or standardized.
            local_pixel_values: (B, L, C, h, w).
            image_index: (B,), of images that are no neighbors of themselves.
        """
        num_crops = pixel_values.shape[1]
        views = [view for view in (pixel_values, local_pixel_values) if view is not None]
        by_block = zip(*(self.class_tokens(view) for view in views), strict=True)  # each (B, T or L, D)
        if not return_loss:
            return MimOutput()
        losses, similarities = [], []
        head: Any
        for head, tokens in zip(self.heads, by_block, strict=True):
            projections, predictions = head(torch.cat(tokens, dim=1))  # (B, S, E)
            keys = projections[:, :num_crops].detach()  # (B, T, E)
            with full_precision(keys.device):
                # The queue has training images only: the numbers of others are not theirs.
                known = image_index if self.training else None
                neighbors = head.queue.nearest(keys, known, self.config.num_candidates)
                losses.append(neighbor_loss(keys, neighbors, predictions, self.config.temperature))
                similarities.append((keys * neighbors).sum(dim=-1).mean())
            if self.training:
                head.queue.add(keys[:, 0], image_index)
        similarity = mean_metric(torch.stack(similarities).mean(), len(pixel_values))
        return MimOutput(loss=torch.stack(losses).mean(), metrics={"neighbor_similarity": similarity})

    def class_tokens(self, view: torch.Tensor) -> list[torch.Tensor]:
        """Return the class tokens (B, crops, D) that the last blocks make of crops (B, crops, C, H, W)."""
        outputs = self.encoder.last_blocks(self.standardize(view).flatten(0, 1), self.config.num_refined_blocks)
        outputs = [*outputs[:-1], self.encoder.normalize(outputs[-1])]
        return [tokens[:, 0].unflatten(0, view.shape[:2]) for tokens in outputs]

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """The loss is a mean over images."""
        return {"loss": len(batch["pixel_values"])}

    @property
    def compares_images(self) -> bool:
        return True

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return how close the neighbors are."""
        similarity = logs.get("neighbor_similarity", logs.get("eval_neighbor_similarity"))
        return [] if similarity is None else [f"similarity of neighbors {similarity:.2f}"]

    def after_step(self, progress: Progress) -> None:
        """Let the queues follow."""
        head: Any
        for head in self.heads:
            head.queue.update()

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Draw the first global crop, where the class token looks, and the features of the patches."""
        return feature_panel(self, batch["pixel_values"][:, 0], {"encoder": self.encoder}, attends="encoder")


def neighbor_loss(
    keys: torch.Tensor, neighbors: torch.Tensor, predictions: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the mean cross entropy of finding the crop of the same image, over all pairs of two crops (Eq. 2).

    A key (B, T, E) is compared with predictions of all images, and its neighbor (B, T, E) with that of its own image.

    Args:
        predictions: (B, S, E), of all crops; the first T are those of the keys, which are not compared with their own.
    """
    num_images, num_keys = keys.shape[:2]
    logits = torch.einsum("bte,ase->tsba", keys, gathered(predictions)) / temperature  # (T, S, B, A)
    own = torch.einsum("bte,bse->tsb", neighbors, predictions) / temperature  # (T, S, B)
    is_own = torch.eye(num_images, dtype=torch.bool, device=keys.device)
    before = num_images * this_process()[0]
    is_own = nn.functional.pad(is_own, (before, logits.shape[-1] - num_images - before))  # (B, A)
    logits = torch.where(is_own, own[..., None], logits)
    terms = (logits.logsumexp(dim=-1) - own).mean(dim=-1)  # (T, S)
    num_predictions = terms.shape[1]
    same = torch.eye(num_keys, num_predictions, dtype=torch.bool, device=keys.device)
    return terms.masked_fill(same, 0).sum() / (num_keys * num_predictions - num_keys)
