"""Instance segmentation: EoMT on a pre-trained ViT, exported as a native model of transformers.

Paper: Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model" (EoMT), arXiv:2503.19108.
Code: tue-mps/eomt; the matching and the losses are those of Mask2Former (Cheng et al. 2022, arXiv:2112.01527).
Differs: the losses are means over each image, with all pixels of its predictions instead of random ones, and the
queries that attend to everything are drawn once per step, so that a step does not depend on how its images are spread
over micro-batches and processes. An evaluation rounds the probability of the attention masks to 0 or 1.
Differs from transformers: nothing; the class of the same name computes the same from the same parameters.
Shapes: B images, C channels, H W pixels, Q queries, K classes, h w rows and columns of a predicted mask, n objects of
an image, M places for objects in a batch, D width, T tokens, L predicted layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import EomtConfig, EomtForUniversalSegmentation, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .patches import gray_to_rgb, patch_grid
from .positions import resize_positions
from .schedules import Progress

FAMILIES = ("vit", "vit_mae")  # model types of encoders
NO_OBJECT = -1  # the class of a place in a batch that has no object
_SMALLEST_STRIDE = 4  # pixels between the values of a predicted mask, if patches are larger
_ANNEALING_POWER = 0.9
_OF_LAYER = {  # our name of a part of a block, and transformers' in an EoMT
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attention.out_proj",
}


class InstanceSegmenter(EomtForUniversalSegmentation):
    """An EomtForUniversalSegmentation with the same parameter names, for training."""

    no_weight_decay = ("cls_token", "register_tokens", "position_embeddings.weight")
    supports_gradient_checkpointing = True

    def __init__(self, config: EomtConfig):
        super().__init__(config)
        self._attends_everywhere = torch.zeros(config.num_blocks, config.num_queries, dtype=torch.bool)

    @property
    def base_model(self) -> nn.Module:
        """The parts that come from the encoder."""
        encoder: Any = nn.Module()
        encoder.config = self.config
        for name in ("embeddings", "layers", "layernorm"):
            setattr(encoder, name, getattr(self, name))
        return encoder  # type: ignore[no-any-return]

    def before_step(self, progress: Progress) -> None:
        """Set the probability of a masked attention in each block, and draw for which queries there is none."""
        num_blocks = self.config.num_blocks
        done = progress.step / max(1, progress.num_steps)
        probabilities = torch.tensor([mask_probability(done, block, num_blocks) for block in range(num_blocks)])
        self.attn_mask_probs.copy_(probabilities)
        generator = torch.Generator().manual_seed(progress.step)
        drawn = torch.rand(num_blocks, self.config.num_queries, generator=generator)
        self._attends_everywhere = drawn >= probabilities[:, None]

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        """(B, C, H, W) -> masks_queries_logits (B, Q, h, w), class_queries_logits (B, Q, K + 1); `layers` has both of
        each predicted layer, the last one last.
        """
        hidden = self.embeddings(pixel_values)  # (B, T, D)
        first = self.num_hidden_layers - self.config.num_blocks
        layers = []
        for number, layer in enumerate(self.layers):
            mask = None
            if number == first:
                hidden = torch.cat([self.query.weight[None].expand(len(hidden), -1, -1).to(hidden), hidden], 1)
            if number >= first and (self.training or self.attn_mask_probs[number - first] >= 0.5):
                layers.append(self.predict(self.layernorm(hidden)))
                if self.training:
                    everywhere = self._attends_everywhere[number - first].to(hidden.device)
                else:
                    everywhere = torch.zeros(self.config.num_queries, dtype=torch.bool, device=hidden.device)
                if not everywhere.all():
                    mask = self._attention_mask(hidden, layers[-1][0], everywhere)
            hidden = layer(hidden, mask)
        layers.append(self.predict(self.layernorm(hidden)))
        masks, classes = layers[-1]
        return ModelOutput(masks_queries_logits=masks, class_queries_logits=classes, layers=tuple(layers))

    def _attention_mask(
        self, hidden: torch.Tensor, mask_logits: torch.Tensor, everywhere: torch.Tensor
    ) -> torch.Tensor:
        """Return what is added to the attention (B, 1, T, T): a query sees patches inside of its predicted mask."""
        num_queries = self.config.num_queries
        inside = F.interpolate(mask_logits, size=self.grid_size, mode="bilinear").flatten(2) > 0  # (B, Q, patches)
        seen = inside | everywhere[:, None]
        added = hidden.new_zeros(len(hidden), 1, hidden.shape[1], hidden.shape[1])
        added[:, 0, :num_queries, num_queries + self.embeddings.num_prefix_tokens :].masked_fill_(~seen, -1e9)
        return added


def mask_probability(done: float, block: int, num_blocks: int) -> float:
    """Return the probability of a masked attention in a block when a fraction of the training is `done`.

    The first block stops first; the blocks share the training but for its beginning and its end.
    """
    length = 1 / (num_blocks + 2)
    left = 1 - (done - (block + 1) * length) / length
    return float(min(1.0, max(0.0, left)) ** _ANNEALING_POWER)


def segmentation_loss(
    model: InstanceSegmenter, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the mean over the images of the losses, summed over the layers.

    Args:
        batch: "masks" uint8 (B, M, H, W) and "classes" int64 (B, M), `NO_OBJECT` where there is no object.
    """
    losses = []
    for number, classes in enumerate(batch["classes"]):
        found = classes != NO_OBJECT
        masks = batch["masks"][number, found].float()[:, None]  # (n, 1, H, W)
        size = layers[-1][0].shape[2], layers[-1][0].shape[3]
        # Shares of the pixels that belong to the object: no boundary is lost at the resolution of the predictions.
        masks = F.adaptive_avg_pool2d(masks, size).flatten(1) if len(masks) else masks.new_zeros(0, size[0] * size[1])
        for mask_logits, class_logits in layers:
            own = mask_logits[number].float().flatten(1), class_logits[number].float()
            losses.append(_loss_of_image(model.config, *own, masks, classes[found]))
    return torch.stack(losses).sum() / len(batch["classes"])


def _loss_of_image(
    config: Any, mask_logits: torch.Tensor, class_logits: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Return the loss of mask logits (Q, h*w) and class logits (Q, K + 1), given masks (n, h*w) and classes (n,)."""
    num_classes = class_logits.shape[1] - 1
    queries, objects = match(config, mask_logits, class_logits, masks, classes)
    targets = torch.full_like(class_logits[:, 0], num_classes, dtype=torch.long)
    targets[queries] = classes[objects]
    weights = class_logits.new_ones(num_classes + 1)
    weights[-1] = config.no_object_weight
    loss: torch.Tensor = config.class_weight * F.cross_entropy(class_logits, targets, weights)
    if not len(queries):
        return loss + 0 * mask_logits.sum()  # every parameter has a gradient
    logits, wanted = mask_logits[queries], masks[objects]
    of_pixels = F.binary_cross_entropy_with_logits(logits, wanted)
    probabilities = logits.sigmoid()
    dice = 1 - (2 * (probabilities * wanted).sum(1) + 1) / (probabilities.sum(1) + wanted.sum(1) + 1)
    total: torch.Tensor = loss + config.mask_weight * of_pixels + config.dice_weight * dice.mean()
    return total


@torch.no_grad()
def match(
    config: Any, mask_logits: torch.Tensor, class_logits: torch.Tensor, masks: torch.Tensor, classes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which queries belong to which objects, each (min(Q, n),), at the lowest cost."""
    from scipy.optimize import linear_sum_assignment  # imported late: only training needs it

    of_class = -class_logits.softmax(1)[:, classes]  # (Q, n)
    inside, outside = F.softplus(-mask_logits), F.softplus(mask_logits)  # cross entropy of a pixel of either kind
    of_pixels = (inside @ masks.T + outside @ (1 - masks).T) / masks.shape[1]
    probabilities = mask_logits.sigmoid()
    dice = 1 - (2 * probabilities @ masks.T + 1) / (probabilities.sum(1, keepdim=True) + masks.sum(1) + 1)
    cost = config.class_weight * of_class + config.mask_weight * of_pixels + config.dice_weight * dice
    # A loss that is not finite stops the training with the reason; the assignment would fail before.
    queries, objects = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return tuple(torch.as_tensor(index, device=cost.device) for index in (queries, objects))  # type: ignore[return-value]


def build_instance_segmenter(
    encoder: PreTrainedModel, labels: Sequence[str], *, image_size: int, num_queries: int, drop_path_rate: float
) -> InstanceSegmenter:
    """Return an EoMT of square color images with the encoder's weights, new queries and new heads.

    Raises:
        ValueError: If the encoder is no ViT, or an EoMT cannot hold it.
    """
    given: Any = encoder.config
    if given.model_type not in FAMILIES:
        raise ValueError(
            f"`model` {given.name_or_path}".rstrip()
            + f" is a {given.model_type}, expected one of {', '.join(sorted(FAMILIES))}"
        )
    if given.intermediate_size % given.hidden_size:
        raise ValueError(
            f"intermediate_size is {given.intermediate_size}, expected a multiple of hidden_size {given.hidden_size}"
        )
    grid = patch_grid(image_size, given.patch_size)
    config = EomtConfig(
        hidden_size=given.hidden_size,
        num_hidden_layers=given.num_hidden_layers,
        num_attention_heads=given.num_attention_heads,
        mlp_ratio=given.intermediate_size // given.hidden_size,
        hidden_act=given.hidden_act,
        hidden_dropout_prob=given.hidden_dropout_prob,
        attention_dropout=given.attention_probs_dropout_prob,
        layer_norm_eps=given.layer_norm_eps,
        initializer_range=given.initializer_range,
        image_size=image_size,
        patch_size=image_size // grid[0],
        layerscale_value=1.0,
        drop_path_rate=float(drop_path_rate),
        num_register_tokens=0,
        num_queries=num_queries,
        num_blocks=min(given.num_hidden_layers, max(1, math.ceil(given.num_hidden_layers / 8) + 1)),
        num_upscale_blocks=max(1, round(math.log2(image_size / grid[0] / _SMALLEST_STRIDE))),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    segmenter = InstanceSegmenter(config)
    missing, unexpected = segmenter.load_state_dict(_encoder_weights(encoder, grid), strict=False)
    assert not unexpected, f"an EoMT has no parameters for these weights: {unexpected}"
    new = ("embeddings.register_tokens", "query.", "upscale_block.", "mask_head.", "class_predictor.", "criterion.")
    lost = [name for name in missing if not name.startswith((*new, "attn_mask_probs")) and "layer_scale" not in name]
    assert not lost, f"the encoder lacks these weights: {lost}"
    return segmenter


def _encoder_weights(encoder: PreTrainedModel, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return the encoder's weights by the names of an EoMT, which adds no position to the class token."""
    config: Any = encoder.config
    state = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith(("pooler.", "embeddings.mask_token")):
            continue
        new = name
        for part, renamed in _OF_LAYER.items():
            new = new.replace(f".{part}.", f".{renamed}.")
        state[new] = tensor
    positions = resize_positions(
        state.pop("embeddings.position_embeddings"), patch_grid(config.image_size, config.patch_size), grid
    )  # (1, 1 + patches, D)
    state["embeddings.cls_token"] = state["embeddings.cls_token"] + positions[:, :1]
    state["embeddings.position_embeddings.weight"] = positions[0, 1:]
    projection = "embeddings.patch_embeddings.projection.weight"
    if state[projection].shape[1] == 1:
        state[projection] = gray_to_rgb(state[projection])
    for number in range(config.num_hidden_layers):
        for part in ("q", "k", "v"):
            name = f"layers.{number}.attention.{part}_proj.bias"
            state.setdefault(name, torch.zeros(config.hidden_size))  # of an encoder without these biases
    return state


def native_instance_segmenter(segmenter: InstanceSegmenter) -> EomtForUniversalSegmentation:
    """Return the same function as a class of transformers."""
    native: EomtForUniversalSegmentation = EomtForUniversalSegmentation(segmenter.config)
    state = segmenter.state_dict()
    state["attn_mask_probs"] = (state["attn_mask_probs"] >= 0.5).to(state["attn_mask_probs"])
    native.load_state_dict(state, strict=True)
    native.eval()
    return native
