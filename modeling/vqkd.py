"""VQ-KD: an image tokenizer whose codes must suffice to rebuild the features of a frozen teacher.

Paper: Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv:2208.06366,
Sec. 2.2 and App. B.
Code: microsoft/unilm/beit2 (modeling_vqkd.py, norm_ema_quantizer.py) at 768a3c8.
Differs: the teacher is not part of the model: `training.targets` runs it, or the batch contains its features, of any
encoder, interpolated to the grid of the tokenizer. The last bias starts at the mean of these features, not at 0.
Shapes: B images, C channels, H W pixels, h w patches per column and row (N = h * w), D width, E width of a code, K
codes, F width of the teacher.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, BeitConfig, BeitModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.beit.modeling_beit import BeitEmbeddings
from transformers.utils.generic import ModelOutput

from .base import InitializesEveryModule, mean_metric, summarize_means
from .codebook import EmaCodebook
from .dvae import CodebookUse
from .ema import full_precision
from .encoders import AnyShapeEmbeddings, init_like_pytorch, shrink_factor
from .feature_panel import COMPONENTS, enlarged, principal_colors
from .frozen_teacher import match_grid
from .patches import height_and_width, patch_grid
from .schedules import Progress

# The authors' ViTs: learned absolute positions, no bias tables, no LayerScale.
_VIT_DEFAULTS: dict[str, Any] = {
    "model_type": "beit",
    "layer_norm_eps": 1e-6,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": False,
    "layer_scale_init_value": 0.0,
    "drop_path_rate": 0.0,
}


@strict
class VqkdConfig(PreTrainedConfig):
    """Configuration of a VQ-KD; the defaults are the published ones, with CLIP ViT-B/16 as the teacher.

    Images are uint8, or floats in [0, 1]: they are not standardized.

    Args:
        encoder_config: A BeitConfig, or its settings; the decoder has the same widths.
        code_size: E.
        feature_size: F.
        decoder_num_hidden_layers: Blocks of the decoder; 1 leaves no code unused in the paper, 3 gives better targets.
        codebook_decay: Of the moving averages that the codes are.
        commitment_loss_weight: Of the distance between features and their codes.
        restarts_dead_codes: Whether codes that hardly occur start anew from the features farthest from any code. Not
            in the paper.

    Raises:
        ValueError: If the image size is not a multiple of the patch size, or a setting is out of range.
    """

    model_type = "mim_vqkd"
    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference = ["codes", "metrics"]  # noqa: RUF012 - Trainer wants a list

    encoder_config: Any = None
    vocab_size: int = 8192
    feature_size: int = 512
    code_size: int = 32
    decoder_num_hidden_layers: int = 3
    codebook_decay: float = 0.99
    commitment_loss_weight: float = 1.0
    restarts_dead_codes: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = AutoConfig.for_model(**{**_VIT_DEFAULTS, **(self.encoder_config or {})})
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        patch_grid(self.image_size, self.stride)
        for name, smallest in (("vocab_size", 2), ("code_size", 1), ("decoder_num_hidden_layers", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {smallest} or more")
        if not 0 <= self.codebook_decay < 1:
            raise ValueError(f"codebook_decay is {self.codebook_decay}, expected 0 or more and below 1")

    @property
    def stride(self) -> int:
        """Side in pixels of the square that one code represents."""
        return int(self.encoder_config.patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_and_width(self.encoder_config.image_size)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size

    @property
    def num_channels(self) -> int:
        return int(self.encoder_config.num_channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return patch_grid(self.image_size, self.stride)

    @property
    def decoder_config(self) -> BeitConfig:
        """Return the settings of the decoder, which sees a map of codes (B, E, h, w) as an image with patches of 1."""
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
        settings = {**_VIT_DEFAULTS, **{name: getattr(self.encoder_config, name) for name in names}}
        del settings["model_type"]
        sizes: dict[str, Any] = {"image_size": self.grid, "patch_size": 1, "num_channels": self.code_size}
        return BeitConfig(**settings, **sizes, num_hidden_layers=self.decoder_num_hidden_layers)


@dataclass
class VqkdOutput(ModelOutput):
    """Output of the tokenizer.

    Args:
        loss: Scalar, float32: `feature_loss`, and the weighted `commitment_loss`.
        feature_loss: Mean over patches of 1 - cosine similarity of rebuilt features and the teacher's.
        commitment_loss: Mean squared difference of the values of features and of their codes.
        codes: (B, h, w), int64.
        features: (B, N, F), rebuilt.
        metrics: As in `MimOutput`.
    """

    loss: torch.Tensor | None = None
    feature_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    features: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


class VqkdVit(InitializesEveryModule, BeitModel):
    """A BeitModel with absolute positions and the authors' initialization, as encoder and as decoder."""

    def __init__(self, config: BeitConfig):
        super().__init__(config, add_pooling_layer=False)
        self.embeddings = AnyShapeEmbeddings(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02 / shrink_factor(self.layers, module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init_like_pytorch(module)
        elif isinstance(module, BeitEmbeddings):
            for name in ("cls_token", "position_embeddings"):
                init.trunc_normal_(getattr(module, name), std=0.02)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]  # LayerNorm

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, D), normalized."""
        tokens: torch.Tensor = self(pixels).last_hidden_state
        return tokens[:, 1:]


class VqkdModel(InitializesEveryModule, PreTrainedModel):
    """An image tokenizer: `get_codebook_indices` encodes images as codes, `decode` draws codes as colors."""

    config: VqkdConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    no_weight_decay: ClassVar[tuple[str, ...]] = ("cls_token", "position_embeddings")
    targets: ClassVar[str] = "teacher"
    # For people: names, what `decode` returns, the validation loss in words, and the method that predicts the codes.
    title: ClassVar[str] = "VQ-KD"
    description: ClassVar[str] = "a VQ-KD as in [BEiT v2](https://arxiv.org/abs/2208.06366)"
    decodes: ClassVar[str] = "colors in [0, 1], similar ones for similar codes"
    loss_in_words: ClassVar[str] = "Validation loss, 1 - cosine similarity to the teacher, and commitment: {}."
    used_by: ClassVar[str] = "beit2"
    view_interpolation: ClassVar[str] = "bicubic"  # of the images that BEiT v2 shows to its tokenizer

    def __init__(self, config: VqkdConfig):
        super().__init__(config)
        width = config.encoder_config.hidden_size
        self.encoder = VqkdVit(config.encoder_config)
        self.to_code = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.code_size))
        self.codebook = EmaCodebook(
            config.vocab_size, config.code_size, config.codebook_decay, config.restarts_dead_codes
        )
        self.decoder = VqkdVit(config.decoder_config)
        self.to_features = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.feature_size))
        self.post_init()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.config.image_size

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, EmaCodebook):
            module.init_weights()

    def forward(
        self,
        pixel_values: torch.Tensor,
        teacher_features: torch.Tensor | None = None,
        teacher_class_token: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> VqkdOutput:
        """Rebuild the teacher's features from the codes of images.

        Args:
            pixel_values: (B, C, H, W), uint8 or floats in [0, 1].
            teacher_features: (B, F, h', w'), of the same images on the teacher's grid, which is interpolated.
            teacher_class_token: Of the teacher's features; unused.

        Raises:
            ValueError: If `teacher_features` are missing for the loss.
        """
        features = self.encode(pixel_values)  # (B, N, E)
        codes, quantized = self.codebook(features)
        passed_through = features + (quantized - features).detach()  # the gradient of the decoder is the encoder's
        rebuilt = self.to_features(self.decoder.patches(self._as_map(passed_through)))  # (B, N, F)
        codes = codes.unflatten(1, self.config.grid)
        if not return_loss:
            return VqkdOutput(codes=codes, features=rebuilt)
        if teacher_features is None:
            raise ValueError("VQ-KD rebuilds the features of a teacher: pass `teacher_features` (B, F, h, w)")
        similarity = F.cosine_similarity(rebuilt.float(), match_grid(teacher_features, self.config.grid), dim=-1)
        feature_loss, commitment_loss = (1 - similarity).mean(), F.mse_loss(features, quantized)
        metrics = {
            "feature_loss": mean_metric(feature_loss, len(pixel_values)),
            "commitment_loss": mean_metric(commitment_loss, len(pixel_values)),
            "code_counts": _counts(codes, self.vocab_size),
        }
        return VqkdOutput(
            loss=feature_loss + self.config.commitment_loss_weight * commitment_loss,
            feature_loss=feature_loss.detach(),
            commitment_loss=commitment_loss.detach(),
            codes=codes,
            features=rebuilt,
            metrics=metrics,
        )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return features (B, N, E) of unit length, float32, of images (B, C, H, W), uint8 or floats in [0, 1]."""
        if tuple(pixel_values.shape[2:]) != self.image_size:
            shown = " x ".join(map(str, pixel_values.shape[2:]))
            raise ValueError(
                f"images of {shown} pixels do not fit this tokenizer; resize them to "
                f"{' x '.join(map(str, self.image_size))}"
            )
        pixels = pixel_values / 127.5 if pixel_values.dtype == torch.uint8 else 2 * pixel_values.float()
        patches = self.encoder.patches(pixels - 1)
        with full_precision(patches.device):
            features: torch.Tensor = F.normalize(self.to_code(patches.float()), dim=-1)
        return features

    def _as_map(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, N, E) -> (B, E, h, w)."""
        images: torch.Tensor = codes.transpose(1, 2).unflatten(2, self.config.grid)
        return images

    @torch.no_grad()
    def get_codebook_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes (B, h, w), int64, of images (B, C, H, W), uint8 or floats in [0, 1]."""
        with full_precision(pixel_values.device):  # half precision swaps codes of similar distance
            codes: torch.Tensor = self.codebook.nearest(self.encode(pixel_values)).unflatten(1, self.config.grid)
        return codes

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Draw codes (B, h, w) as images (B, 3, H, W) in [0, 1], in which similar codes have similar colors."""
        colors = principal_colors(self.codebook.codes[None, None])[0, :, 0].T  # (K, 3), on the CPU
        images: torch.Tensor = colors[indices.cpu()].movedim(-1, 1)
        return enlarged(images, self.image_size)

    # ---- training ----

    @torch.no_grad()
    def start_from_images(self, batches: Iterable[Mapping[str, torch.Tensor]], generator: torch.Generator) -> None:
        """Start the codebook from the k-means of images, and the last bias from the mean of the teacher's features.

        A decoder that has to learn this mean first moves all features of the encoder the same way, to a few codes, and
        a short run stays there.

        Args:
            batches: With `pixel_values` and `teacher_features`, as in `forward`.

        Raises:
            ValueError: If the images have fewer patches than there are codes.
        """
        patches, sums = [], []
        for batch in batches:
            patches.append(self.encode(batch["pixel_values"]).flatten(0, 1))
            features = F.normalize(match_grid(batch["teacher_features"], self.config.grid), dim=-1)
            sums.append(features.sum((0, 1)))
        self.codebook.start(torch.cat(patches), generator)
        bias: torch.Tensor = self.to_features[-1].bias  # type: ignore[assignment]
        mean = torch.stack(sums).sum(0) / sum(map(len, patches))  # of unit length each
        bias.copy_(mean * math.sqrt(len(bias)))

    @property
    def num_images_to_start_from(self) -> int:
        """Images that have four patches for each code."""
        return math.ceil(4 * self.vocab_size / math.prod(self.config.grid))

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Both losses are means over the patches, of which all images have equally many."""
        return {"loss": len(batch["pixel_values"])}

    def after_step(self, progress: Progress) -> None:
        """Let the codebook follow."""
        self.codebook.update()

    # ---- what people see ----

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the mean losses and the use of the codebook."""
        means = summarize_means({name: total for name, total in sums.items() if name.endswith("_loss")})
        return {**means, **asdict(CodebookUse.of(sums["code_counts"]))}

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Return whether few codes occur, and what to change."""
        signs = CodebookUse.signs_of_collapse(logs, self.vocab_size)
        return signs and f"{signs}: lower `learning_rate` and `codebook_decay`, and set `restarts_dead_codes`."

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return phrases about the losses and the use of the codebook."""
        phrases = []
        if "feature_loss" in logs:
            phrases.append(f"1 - cosine {logs['feature_loss']:.3f}  commitment {logs['commitment_loss']:.2g}")
        for prefix in ("", "eval_", "codebook_"):
            if f"{prefix}perplexity" in logs:
                alive, tokens = logs[f"{prefix}num_alive"], logs[f"{prefix}num_tokens"]
                phrases.append(f"{alive:,} codes in {tokens:,} tokens, perplexity {logs[f'{prefix}perplexity']:.1f}")
        return phrases

    @torch.no_grad()
    def panel(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the images, the teacher's and the rebuilt features in the same colors, and the codes."""
        pixels, grid = batch["pixel_values"], self.config.grid
        output = self(pixels, return_loss=False)
        both = F.normalize(torch.cat([match_grid(batch["teacher_features"], grid), output.features.float()]), dim=-1)
        colors = enlarged(principal_colors(both.unflatten(1, grid)), self.image_size)
        teacher, rebuilt = colors.chunk(2)
        return {
            "input": pixels.float().cpu() / 255,
            f"teacher: {COMPONENTS}": teacher,
            f"rebuilt from {math.prod(grid)} codes": rebuilt,
            "the codes, similar ones in similar colors": self.decode(output.codes),
        }


def _counts(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Count codes like `bincount`, which would wait for the device."""
    ones = torch.ones_like(codes.flatten())
    return torch.zeros(num_codes, dtype=torch.int64, device=codes.device).index_add_(0, codes.flatten(), ones)
