"""The discrete VAE of DALL-E: encode an image as a grid of codes, and decode codes to an image.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", arXiv:2102.12092, Sec. 2.1 and App. A; its use as an
image tokenizer: Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 2.1.
Code: openai/DALL-E, microsoft/unilm/beit/dall_e (encoder and decoder; the training code was never published).
Shapes: B images, C channels, H W pixels, h w codes (H = h * stride), K codes in the codebook, E decoder input width.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

PIXEL_EPSILON = (
    0.1  # pixels in [0, 1] are mapped to [0.1, 0.9], because the logit-Laplace density is defined on (0, 1)
)
_COLLAPSED_SHARE = 0.05  # of the codes, that the perplexity is when tokens no longer say much about an image


@strict
class DvaeConfig(PreTrainedConfig):
    """Configuration of a discrete VAE; the defaults are DALL-E's.

    `image_size` is the size of the training images; the model takes any multiple of `stride`. Images are uint8, or
    floats in [0, 1]: they are not standardized.

    Raises:
        ValueError: If the image size is not a multiple of the stride, or the hidden size not one of 4.
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

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}, expected a multiple of 4, the reduction in a block")
        height, width = self.input_size
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image size {height} x {width} is not a multiple of the tokenizer's stride of {self.stride} pixels "
                "(2 to the power of num_groups - 1)"
            )

    @property
    def stride(self) -> int:
        """Side in pixels of the square that one code represents."""
        return int(2 ** (self.num_groups - 1))

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the training images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass
class DvaeOutput(ModelOutput):
    """Output of the tokenizer.

    Args:
        loss: Scalar, the weighted sum of the terms.
        reconstruction_loss: Mean negative log density of a pixel channel, in nats.
        kl: Mean divergence of a position's distribution of codes from the uniform one, in nats.
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
    """The number of different codes among `num_tokens`, and their perplexity (the exponential of the entropy)."""

    num_tokens: int
    num_alive: int
    perplexity: float

    @classmethod
    def of(cls, histogram: torch.Tensor) -> "CodebookUse":
        """Compute it from the counts of all codes (K,)."""
        num_tokens = int(histogram.sum())
        frequencies = histogram[histogram > 0].double() / num_tokens
        entropy = -(frequencies * frequencies.log()).sum().item()
        return cls(num_tokens, len(frequencies), math.exp(entropy))

    @staticmethod
    def signs_of_collapse(logs: Mapping[str, float], vocab_size: int) -> str | None:
        """Return that the tokens of an evaluation say little about an image, in words; None if they say enough."""
        if "perplexity" not in logs:
            return None
        perplexity, num_tokens, num_alive = logs["perplexity"], int(logs["num_tokens"]), int(logs["num_alive"])
        if perplexity >= _COLLAPSED_SHARE * min(vocab_size, num_tokens):
            return None
        return (
            f"the perplexity of the codes is only {perplexity:.1f} ({num_alive:,} of {vocab_size:,} occur in "
            f"{num_tokens:,} tokens), so that tokens say little about an image"
        )


class DvaeBlock(nn.Module):
    """A residual block of four convolutions; its last one is 1x1 in the encoder, its first one in the decoder."""

    def __init__(self, width_in: int, width_out: int, kernel_sizes: tuple[int, int, int, int], gain: float):
        super().__init__()
        self.gain = gain
        hidden = width_out // 4
        self.identity = _conv(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        widths = (width_in, hidden, hidden, hidden, width_out)
        layers = []
        for i, kernel_size in enumerate(kernel_sizes):
            layers += [nn.ReLU(), _conv(widths[i], widths[i + 1], kernel_size)]
        self.residual = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.identity(x) + self.gain * self.residual(x)
        return y


class DvaeModel(PreTrainedModel):
    """An image tokenizer: `get_codebook_indices` encodes images as codes, and `decode` turns codes into images."""

    config: DvaeConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    accepts_loss_kwargs = False
    # For people: names, what `decode` returns, the validation loss in words, and the method that predicts the codes.
    title: ClassVar[str] = "discrete VAE"
    description: ClassVar[str] = "a discrete VAE as in [DALL-E](https://arxiv.org/abs/2102.12092)"
    decodes: ClassVar[str] = "in [0, 1]"
    loss_in_words: ClassVar[str] = "Validation reconstruction loss, from the chosen codes: {} nats per pixel channel."
    used_by: ClassVar[str] = "beit"

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
        """Height and width of the training images."""
        return self.config.input_size

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
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
        """Reconstruct images from soft samples of their codes in training, and from the likeliest codes otherwise.

        Args:
            pixel_values: (B, C, H, W), uint8 or floats in [0, 1].
            temperature: Temperature of the Gumbel-softmax relaxation.
            kl_weight: The paper's beta.
            usage_weight: Weight of the divergence of the batch's mean distribution from uniform; not in the paper.
        """
        pixels = map_pixels(pixel_values)
        logits = self.encode(pixels)  # (B, K, h, w)
        codes = logits.detach().argmax(dim=1)  # (B, h, w)
        if not return_loss:
            return DvaeOutput(codes=codes)
        if self.training:
            maps = self._decode_maps(self._embed_soft(gumbel_softmax(logits, temperature)))
        else:
            maps = self._decode_maps(self._embed(codes))
        reconstruction_loss = logit_laplace_loss(maps, pixels).mean()
        kl = kl_from_uniform(logits).mean()
        # The paper sums the divergences over an image and divides all terms by its C*H*W values.
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

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Return whether few codes occur, and what to change."""
        signs = CodebookUse.signs_of_collapse(logs, self.vocab_size)
        return signs and f"{signs}: set `start_from_images`, or raise `usage_weight`."

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
        """Return the images, and their reconstructions from codes and from the probabilities of all codes."""
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
        """Return the likeliest codes (B, h, w), int64, of images (B, C, H, W), uint8 or floats in [0, 1]."""
        with _no_autocast(pixel_values):  # half precision swaps codes of similar probability
            return self.encode(map_pixels(pixel_values)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Decode codes (B, h, w) to images (B, C, H, W) in [0, 1]."""
        return self._decode_images(self._embed(indices))

    @torch.no_grad()
    def decode_soft(self, weights: torch.Tensor) -> torch.Tensor:
        """Decode weights (B, K, h, w) of all codes at each position to images (B, C, H, W) in [0, 1]."""
        return self._decode_images(self._embed_soft(weights))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, h, w), float32, of mapped pixels (B, C, H, W)."""
        height, width = pixels.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be divided into codes of {self.config.stride} x "
                f"{self.config.stride} pixels; resize them to {' x '.join(map(str, self.image_size))}"
            )
        features = self.encoder(pixels.to(self.to_logits.weight.dtype))
        with _no_autocast(features):  # the original keeps this layer in float32 too
            logits: torch.Tensor = self.to_logits(features.to(self.to_logits.weight.dtype))
        return logits.float()

    def _embed_soft(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the decoder's input (B, E, h, w) for weights (B, K, h, w) of all codes."""
        with _no_autocast(weights):
            embedded: torch.Tensor = self.from_codes(weights.to(self.from_codes.weight.dtype))
        return embedded

    def _embed(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the decoder's input (B, E, h, w) for codes (B, h, w), without one-hot maps."""
        table = self.from_codes.weight.flatten(1).T  # (K, E)
        assert self.from_codes.bias is not None
        return (nn.functional.embedding(indices, table) + self.from_codes.bias).permute(0, 3, 1, 2)

    def _decode_images(self, x: torch.Tensor) -> torch.Tensor:
        return unmap_pixels(self._decode_maps(x).chunk(2, dim=1)[0].sigmoid())

    def _decode_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Decode (B, E, h, w) to the mean and log scale of each pixel channel, (B, 2C, H, W), float32."""
        maps: torch.Tensor = self.decoder(x)
        return maps.float()


def map_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels, or floats in [0, 1], to floats in [0.1, 0.9]."""
    pixels = pixel_values / 255 if pixel_values.dtype == torch.uint8 else pixel_values.float()
    return (1 - 2 * PIXEL_EPSILON) * pixels + PIXEL_EPSILON


def unmap_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Map floats in [0.1, 0.9] to [0, 1]; values outside are clamped."""
    return ((pixels - PIXEL_EPSILON) / (1 - 2 * PIXEL_EPSILON)).clamp(0, 1)


def gumbel_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw a soft sample along dim 1; as in the paper, without a straight-through estimator."""
    uniform = torch.rand_like(logits, dtype=torch.float32)
    limits = torch.finfo(torch.float32)
    gumbel = -(-uniform.clamp(limits.tiny, 1 - limits.eps).log()).log()
    return ((logits.float() + gumbel) / temperature).softmax(dim=1)


def kl_from_uniform(logits: torch.Tensor) -> torch.Tensor:
    """Return sum_k q (ln q + ln K) of shape (B, ...) for logits (B, K, ...); q has neither noise nor temperature."""
    log_q = logits.float().log_softmax(dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def kl_of_mean_from_uniform(logits: torch.Tensor) -> torch.Tensor:
    """Return a scalar for logits (B, K, h, w): 0 if the batch uses all codes equally often, ln K if only one."""
    mean = logits.float().softmax(dim=1).mean(dim=(0, 2, 3))  # (K,)
    return torch.xlogy(mean, mean * len(mean)).sum()


def logit_laplace_loss(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the negative log density (App. A.3) of pixels (B, C, H, W) in (0, 1), given maps (B, 2C, H, W).

    p(x) = exp(-|logit x - mean| / scale) / (2 scale x (1 - x))
    """
    mean, log_scale = maps.chunk(2, dim=1)
    distance = (pixels.logit() - mean).abs()
    return math.log(2) + log_scale + pixels.log() + (-pixels).log1p() + distance * (-log_scale).exp()


def _encoder(config: DvaeConfig) -> nn.Sequential:
    """Build groups of doubling width, each but the last followed by a pooling that halves the resolution."""
    widths = [config.hidden_size * 2**group for group in range(config.num_groups)]
    layers: dict[str, nn.Module] = {"input": _conv(config.num_channels, config.hidden_size, 7)}
    layers |= _groups(config, [config.hidden_size, *widths], (3, 3, 3, 1), lambda: nn.MaxPool2d(2))
    return nn.Sequential(OrderedDict(layers))


def _decoder(config: DvaeConfig) -> nn.Sequential:
    """Build the mirror image of the encoder, with nearest-neighbor upsampling."""
    widths = [config.hidden_size * 2**group for group in reversed(range(config.num_groups))]
    layers = _groups(config, [config.decoder_input_size, *widths], (1, 3, 3, 3), lambda: nn.Upsample(scale_factor=2))
    layers["output"] = _conv(config.hidden_size, 2 * config.num_channels, 1)
    return nn.Sequential(OrderedDict(layers))


def _groups(
    config: DvaeConfig, widths: list[int], kernel_sizes: tuple[int, int, int, int], resample: Callable[[], nn.Module]
) -> dict[str, nn.Module]:
    gain = 1 / (config.num_groups * config.num_blocks_per_group) ** 2
    groups: dict[str, nn.Module] = {}
    for number, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        inputs = [width_in] + [width_out] * (config.num_blocks_per_group - 1)
        blocks: list[nn.Module] = [DvaeBlock(width, width_out, kernel_sizes, gain) for width in inputs]
        if number < config.num_groups:
            blocks.append(resample())
        groups[f"group_{number}"] = nn.Sequential(*blocks)
    return {**groups, "relu": nn.ReLU()}


def _no_autocast(tensor: torch.Tensor) -> Any:
    # The meta device, on which memory is estimated, has no autocast to turn off.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _conv(width_in: int, width_out: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel_size, padding=kernel_size // 2)
