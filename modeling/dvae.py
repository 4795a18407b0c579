"""The discrete VAE of DALL-E: an image becomes a grid of codes, and codes become an image again.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", arXiv:2102.12092, Sec. 2.1 and App. A; its use as an
image tokenizer: Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 2.1.
Code: openai/DALL-E, microsoft/unilm/beit/dall_e (encoder and decoder; the training code was never published).
Shapes: B images, C channels, H W pixels, h w codes (H = h * stride), K codes in the book, D width of the first group.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

PIXEL_EPSILON = 0.1  # pixels in [0, 1] are mapped into [0.1, 0.9]: the logit-Laplace density lives on (0, 1)


@strict
class DvaeConfig(PreTrainedConfig):
    """Sizes; the defaults are the original's. `image_size` is what it was trained on, any multiple of `stride` works.

    Pixels are uint8, or floats in [0, 1]: there is no mean or deviation to know.
    """

    model_type = "mim_dvae"
    image_size: int | list[int] | tuple[int, ...] = 256
    num_channels: int = 3
    vocab_size: int = 8192
    hidden_size: int = 256
    num_groups: int = 4
    num_blocks_per_group: int = 2
    decoder_input_size: int = 128
    keys_to_ignore_at_inference = ["codes", "metrics"]  # noqa: RUF012 - Trainer wants a list

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4: a block works at a quarter of it"
            )
        height, width = self.input_size
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image size {height} x {width} is not a multiple of the tokenizer's stride of {self.stride} pixels "
                f"(2 to the power of num_groups - 1)"
            )

    @property
    def stride(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return 2 ** (self.num_groups - 1)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass
class DvaeOutput(ModelOutput):
    """Output of the tokenizer.

    Args:
        loss: What is minimized.
        reconstruction_loss: Mean negative log density of a pixel channel, in nats.
        kl: Mean over positions of the divergence from a uniform choice of codes, in nats.
        codes: (B, h, w), int64.
        metrics: As in `MimOutput`.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class CodebookUse:
    """How many different codes occur among `num_tokens`, and the exponential of the entropy of their frequencies."""

    num_tokens: int
    num_alive: int
    perplexity: float

    @classmethod
    def of(cls, histogram: torch.Tensor) -> "CodebookUse":
        """Compute it from counts (K,)."""
        num_tokens = int(histogram.sum())
        frequencies = histogram[histogram > 0].double() / num_tokens
        entropy = -(frequencies * frequencies.log()).sum().item()
        return cls(num_tokens, len(frequencies), math.exp(entropy))


class DvaeBlock(nn.Module):
    """x + gain * residual of four convolutions; the decoder's starts with the 1x1 that the encoder's ends with."""

    def __init__(self, width_in: int, width_out: int, kernel_sizes: tuple[int, int, int, int], gain: float):
        super().__init__()
        self.gain = gain
        hidden = width_out // 4
        self.identity = _conv(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        widths = (width_in, hidden, hidden, hidden, width_out)
        layers = []
        for place, kernel_size in enumerate(kernel_sizes):
            layers += [nn.ReLU(), _conv(widths[place], widths[place + 1], kernel_size)]
        self.residual = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.identity(x) + self.gain * self.residual(x)


class DvaeModel(PreTrainedModel):
    """Image tokenizer: `get_codebook_indices` gives the codes of an image, `decode` the image of codes."""

    config: DvaeConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    accepts_loss_kwargs = False

    def __init__(self, config: DvaeConfig):
        super().__init__(config)
        self.encoder = _encoder(config)
        self.to_logits = _conv(config.hidden_size * config.stride, config.vocab_size, 1)
        self.from_codes = _conv(config.vocab_size, config.decoder_input_size, 1)
        self.decoder = _decoder(config)
        self.post_init()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that it was trained on."""
        return self.config.input_size

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: torch.Tensor,
        temperature: float = 1.0,
        kl_weight: float = 0.0,
        usage_weight: float = 0.0,
        return_loss: bool = True,
    ) -> DvaeOutput:
        """(B, C, H, W) images, uint8 or floats in [0, 1]. Codes are soft samples in training, hard ones otherwise.

        `temperature` of the relaxation and `kl_weight` (the paper's beta) follow schedules of the training step.
        `usage_weight`, which the paper does not have, is that of the divergence of the batch's mean from uniform.
        """
        pixels = map_pixels(pixel_values)
        logits = self.encode(pixels)  # (B, K, h, w)
        codes = logits.detach().argmax(dim=1)  # (B, h, w)
        if not return_loss:
            return DvaeOutput(codes=codes)
        if self.training:
            maps = self._maps_of(self._mix(gumbel_softmax(logits, temperature)))
        else:
            maps = self._maps_of(self._pick(codes))
        reconstruction_loss = logit_laplace_loss(maps, pixels).mean()
        kl = kl_from_uniform(logits).mean()
        # The paper adds up the divergences of an image and divides everything by its C*H*W numbers.
        loss = reconstruction_loss + kl_weight * kl / (self.config.num_channels * self.config.stride**2)
        if usage_weight:
            loss = loss + usage_weight * kl_of_mean_from_uniform(logits)
        reconstruction_loss, kl = reconstruction_loss.detach(), kl.detach()
        metrics = {"losses": torch.stack([reconstruction_loss, kl, torch.ones_like(kl)])}
        if not self.training:
            metrics["code_counts"] = torch.bincount(codes.flatten(), minlength=self.vocab_size)
        return DvaeOutput(loss=loss, reconstruction_loss=reconstruction_loss, kl=kl, codes=codes, metrics=metrics)

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the mean losses and, in evaluation, the use of the codebook."""
        reconstruction_loss, kl, count = sums["losses"].tolist()
        if "code_counts" in sums:
            return {"kl": kl / count, **asdict(CodebookUse.of(sums["code_counts"]))}
        return {"reconstruction_loss": reconstruction_loss / count, "kl": kl / count}

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return phrases about the schedules and the use of the codebook."""
        phrases = []
        if "temperature" in logs:
            phrases.append(f"KL {logs['kl']:.2f} x {logs['kl_weight']:.2g}  temperature {logs['temperature']:.3f}")
        for prefix in ("eval_", "codebook_"):
            if f"{prefix}perplexity" in logs:
                alive, tokens = logs[f"{prefix}num_alive"], logs[f"{prefix}num_tokens"]
                phrases.append(f"{alive:,} codes in {tokens:,} tokens, perplexity {logs[f'{prefix}perplexity']:.1f}")
        return phrases

    def panel(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return each image, what its codes decode to, and what the probabilities before the choice decode to."""
        pixels = batch["pixel_values"]
        codes = self.get_codebook_indices(pixels)
        views = {
            "input": pixels / 255,
            f"from {codes[0].numel()} codes": self.decode(codes),
            "from their probabilities": self.decode_soft(self.encode(map_pixels(pixels)).softmax(dim=1)),
        }
        return {label: view.float().cpu() for label, view in views.items()}

    @torch.no_grad()
    def get_codebook_indices(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images, uint8 or floats in [0, 1] -> the likeliest codes (B, h, w), int64, in float32."""
        with _no_autocast(pixel_values):  # half precision flips the closest codes
            return self.encode(map_pixels(pixel_values)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Codes (B, h, w) -> images (B, C, H, W) in [0, 1]."""
        return self._image_of(self._pick(indices))

    @torch.no_grad()
    def decode_soft(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights (B, K, h, w) of all codes at each place -> images (B, C, H, W) in [0, 1]."""
        return self._image_of(self._mix(weights))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mapped pixels (B, C, H, W) -> logits (B, K, h, w), float32."""
        height, width = pixels.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into codes of {self.config.stride} x "
                f"{self.config.stride} pixels; resize them to {' x '.join(map(str, self.image_size))}"
            )
        features = self.encoder(pixels.to(self.to_logits.weight.dtype))
        with _no_autocast(features):  # the original keeps this one in float32 too
            return self.to_logits(features.to(self.to_logits.weight.dtype)).float()

    def _mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Soft codes (B, K, h, w) -> the decoder's input (B, E, h, w)."""
        with _no_autocast(weights):
            return self.from_codes(weights.to(self.from_codes.weight.dtype))

    def _pick(self, indices: torch.Tensor) -> torch.Tensor:
        """The same for hard codes (B, h, w), without writing them out as K maps of zeros and ones."""
        table = self.from_codes.weight.flatten(1).T  # (K, E)
        assert self.from_codes.bias is not None
        return (nn.functional.embedding(indices, table) + self.from_codes.bias).permute(0, 3, 1, 2)

    def _image_of(self, x: torch.Tensor) -> torch.Tensor:
        return unmap_pixels(self._maps_of(x).chunk(2, dim=1)[0].sigmoid())

    def _maps_of(self, x: torch.Tensor) -> torch.Tensor:
        """(B, E, h, w) -> (B, 2C, H, W): mean and logarithm of the scale for each pixel channel, float32."""
        return self.decoder(x).float()


def map_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """uint8, or floats in [0, 1] -> floats in [0.1, 0.9]."""
    pixels = pixel_values / 255 if pixel_values.dtype == torch.uint8 else pixel_values.float()
    return (1 - 2 * PIXEL_EPSILON) * pixels + PIXEL_EPSILON


def unmap_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Floats in [0.1, 0.9], and somewhat outside -> [0, 1]."""
    return ((pixels - PIXEL_EPSILON) / (1 - 2 * PIXEL_EPSILON)).clamp(0, 1)


def gumbel_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """A soft sample along dim 1, soft also in the backward pass: there is no straight-through in the paper."""
    uniform = torch.rand_like(logits, dtype=torch.float32)
    limits = torch.finfo(torch.float32)
    gumbel = -(-uniform.clamp(limits.tiny, 1 - limits.eps).log()).log()
    return ((logits.float() + gumbel) / temperature).softmax(dim=1)


def kl_from_uniform(logits: torch.Tensor) -> torch.Tensor:
    """(B, K, ...) -> (B, ...): sum of q (ln q + ln K) over the K codes, q without noise and temperature."""
    log_q = logits.float().log_softmax(dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def kl_of_mean_from_uniform(logits: torch.Tensor) -> torch.Tensor:
    """(B, K, h, w) -> scalar: 0 where all codes are chosen equally often in the batch, ln K where one always is."""
    mean = logits.float().softmax(dim=1).mean(dim=(0, 2, 3))  # (K,)
    return torch.special.xlogy(mean, mean * len(mean)).sum()


def logit_laplace_loss(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Negative log density of each pixel channel (App. A.3): maps (B, 2C, H, W), pixels (B, C, H, W) in (0, 1).

    p(x) = exp(-|logit x - mean| / scale) / (2 scale x (1 - x))
    """
    mean, log_scale = maps.chunk(2, dim=1)
    distance = (pixels.logit() - mean).abs()
    return math.log(2) + log_scale + pixels.log() + (-pixels).log1p() + distance * (-log_scale).exp()


def _encoder(config: DvaeConfig) -> nn.Sequential:
    """Groups of doubling width, each but the last at twice the stride of the one before."""
    gain = _gain(config)
    groups: OrderedDict[str, nn.Module] = OrderedDict(
        input=_conv(config.num_channels, config.hidden_size, 7),
    )
    width = config.hidden_size
    for group in range(config.num_groups):
        width_out = config.hidden_size * 2**group
        blocks: list[nn.Module] = [
            DvaeBlock(width if place == 0 else width_out, width_out, (3, 3, 3, 1), gain)
            for place in range(config.num_blocks_per_group)
        ]
        if group < config.num_groups - 1:
            blocks.append(nn.MaxPool2d(2))
        groups[f"group_{group + 1}"] = nn.Sequential(*blocks)
        width = width_out
    groups["relu"] = nn.ReLU()
    return nn.Sequential(groups)


def _decoder(config: DvaeConfig) -> nn.Sequential:
    """The mirror image of the encoder, with nearest-neighbor upsampling."""
    gain = _gain(config)
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    width = config.decoder_input_size
    for group in range(config.num_groups):
        width_out = config.hidden_size * 2 ** (config.num_groups - 1 - group)
        blocks: list[nn.Module] = [
            DvaeBlock(width if place == 0 else width_out, width_out, (1, 3, 3, 3), gain)
            for place in range(config.num_blocks_per_group)
        ]
        if group < config.num_groups - 1:
            blocks.append(nn.Upsample(scale_factor=2, mode="nearest"))
        groups[f"group_{group + 1}"] = nn.Sequential(*blocks)
        width = width_out
    groups["relu"] = nn.ReLU()
    groups["output"] = _conv(width, 2 * config.num_channels, 1)
    return nn.Sequential(groups)


def _no_autocast(tensor: torch.Tensor) -> Any:
    # The meta device, on which the run script measures models, has no autocast to turn off.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _gain(config: DvaeConfig) -> float:
    return 1 / (config.num_groups * config.num_blocks_per_group) ** 2


def _conv(width_in: int, width_out: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel_size, padding=kernel_size // 2)
