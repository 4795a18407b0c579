"""A native BEiT encoder whose blocks also read text: shared attention, and a feed-forward network for each modality.

Papers: Wang et al. 2022 (BEiT-3), arXiv:2208.10442, Sec. 2.1; Bao et al. 2021 (VLMo), arXiv:2111.02358, Sec. 3.2.
Code: microsoft/unilm/beit3 and microsoft/torchscale, which contain no pre-training.
Differs: the released code has projections of its own for each modality; here attention and its LayerNorm are shared,
as in the paper, and a feed-forward network has its own LayerNorm, as in VLMo. Text embeddings end in a LayerNorm and
blocks have no further one (sub-LN), so that the image path is a `BeitModel` and the text path a
`RobertaPreLayerNormModel`; with sub-LN, neither class fits.
Shapes: B images or texts, N patches, L tokens of a text, S tokens of a sequence, D width.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import BeitConfig, RobertaPreLayerNormConfig, RobertaPreLayerNormModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.beit.modeling_beit import BeitLayer, BeitMLP

from .encoders import AnyShapeEmbeddings, BeitEncoder, trunc_normal_at_one_std_

# The native pooler of a text is tanh(dense(class token)). So close to 0, tanh is the identity in float32.
POOLER_SCALE = 1e-4
_EXPERTS = "experts."


class TextEmbeddings(nn.Module):
    """Words and learned positions, normalized."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, max_text_length(config), config.hidden_size))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B, L, D)."""
        words = self.word_embeddings(input_ids) + self.position_embeddings[:, : input_ids.shape[1]]
        embedded: torch.Tensor = self.dropout(self.layernorm(words))
        return embedded


class Expert(nn.Module):
    """A LayerNorm and a feed-forward network."""

    def __init__(self, config: BeitConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = BeitMLP(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        fed: torch.Tensor = self.mlp(self.layernorm(tokens))
        return fed


class MultiwayLayer(BeitLayer):
    """A BeitLayer, whose own feed-forward network is the vision expert, with a language and a fusion expert."""

    def __init__(self, config: BeitConfig, drop_path_rate: float, expert_names: tuple[str, ...]):
        super().__init__(config, drop_path_rate)
        self.experts = nn.ModuleDict({name: Expert(config) for name in expert_names})

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        num_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Update a sequence (B, S, D): an image, by default, or `num_image_tokens` of an image and then a text."""
        if num_image_tokens is None:
            image: torch.Tensor = super().forward(hidden_states, attention_mask, *args, **kwargs)
            return image
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask)
        hidden_states = self.drop_path(self.dropout(attended)) + hidden_states
        fed = self.feed_forward(hidden_states, num_image_tokens)
        hidden_states = self.drop_path(self.dropout(fed)) + hidden_states
        return hidden_states

    def feed_forward(self, tokens: torch.Tensor, num_image_tokens: int) -> torch.Tensor:
        """Send each token to the expert of its modality, and those of a pair to the fusion expert if there is one."""
        if num_image_tokens and "fusion" in self.experts:
            fused: torch.Tensor = self.experts["fusion"](tokens)
            return fused
        text: torch.Tensor = self.experts["text"](tokens[:, num_image_tokens:])
        if not num_image_tokens:
            return text
        image = self.mlp(self.layernorm_after(tokens[:, :num_image_tokens]))
        return torch.cat([image, text], dim=1)


class MultiwayEncoder(BeitEncoder):
    """A BeitEncoder for images that also encodes texts, and images with texts.

    Args:
        config: With absolute positions, without relative ones and LayerScale.
        text_config: Sizes of the text path; None for images only.
        num_fusion_layers: Last blocks that have an expert for images with texts.
        use_sub_layernorm: A LayerNorm before the last layers of attention and feed-forward networks.
    """

    use_sub_layernorm = False

    def __init__(
        self,
        config: BeitConfig,
        text_config: RobertaPreLayerNormConfig | None = None,
        num_fusion_layers: int = 0,
        use_sub_layernorm: bool = False,
    ):
        super().__init__(config)
        self.text_config = text_config
        self.embeddings = AnyShapeEmbeddings(config)
        first_fusion = config.num_hidden_layers - num_fusion_layers
        layer: Any
        for number, layer in enumerate(self.layers):
            names = ("text", "fusion") if number >= first_fusion else ("text",)
            rate = getattr(layer.drop_path, "drop_prob", 0.0)
            self.layers[number] = MultiwayLayer(config, rate, names if text_config else ())
        self.text_embeddings = TextEmbeddings(text_config) if text_config else None
        if use_sub_layernorm:
            self.use_sub_layernorm = True
            self._add_sub_layernorms()
        self.post_init()

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode texts (B, L), True or 1 in the mask where there is a token, to (B, L, D)."""
        assert self.text_embeddings is not None
        return self._encode(self.text_embeddings(input_ids), attention_mask, num_image_tokens=0)

    def encode_pair(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Encode standardized images (B, C, H, W) with their texts (B, L) to (B, 1+N+L, D)."""
        assert self.text_embeddings is not None
        image = self.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)  # (B, 1+N, D)
        tokens = torch.cat([image, self.text_embeddings(input_ids)], dim=1)
        attention_mask = nn.functional.pad(attention_mask, (image.shape[1], 0), value=1)
        return self._encode(tokens, attention_mask, image.shape[1])

    def _encode(self, tokens: torch.Tensor, attention_mask: torch.Tensor, num_image_tokens: int) -> torch.Tensor:
        mask = create_bidirectional_mask(
            self.config,
            tokens,
            attention_mask,
            allow_is_bidirectional_skip=False,  # the check would wait for the device
        )
        for layer in self.layers:
            tokens = layer(tokens, mask, num_image_tokens=num_image_tokens)
        encoded: torch.Tensor = self.layernorm(tokens)
        return encoded

    # ---- initialization ----

    def _add_sub_layernorms(self) -> None:
        config = self.config
        layer: Any
        for layer in self.layers:
            layer.attention.o_proj = _after_layernorm(layer.attention.o_proj, config.hidden_size, config)
            for mlp in (layer.mlp, *(expert.mlp for expert in layer.experts.values())):
                mlp.fc2 = _after_layernorm(mlp.fc2, config.intermediate_size, config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            trunc_normal_at_one_std_(module.weight, 0.02 / self._shrink_factor(module))
        elif isinstance(module, TextEmbeddings):
            for table in (module.word_embeddings.weight, module.position_embeddings):
                trunc_normal_at_one_std_(table, 0.02)

    def _shrink_factor(self, linear: nn.Module) -> float:
        """As in BEiT, for every expert; with sub-LN, four layers of a block grow by sqrt(ln 2L) instead."""
        layer: Any
        for number, layer in enumerate(self.layers, start=1):
            experts = layer.experts.values() if isinstance(layer, MultiwayLayer) else ()  # not yet, in BeitModel
            mlps = [layer.mlp, *(expert.mlp for expert in experts)]
            if self.use_sub_layernorm:
                outputs = [layer.attention.o_proj[1], *(mlp.fc2[1] for mlp in mlps)]
                if any(linear is grown for grown in (layer.attention.v_proj, *(mlp.fc1 for mlp in mlps), *outputs)):
                    return 1 / math.sqrt(math.log(2 * len(self.layers)))
            elif any(linear is last for last in (layer.attention.o_proj, *(mlp.fc2 for mlp in mlps))):
                return math.sqrt(2 * number)
        return 1.0

    # ---- export ----

    @property
    def native_root_problem(self) -> str | None:
        """Why transformers' own class cannot compute the same function, or None if it can."""
        if self.use_sub_layernorm:
            return "transformers has no BEiT with use_sub_layernorm"
        rows, columns = self.embeddings.patch_embeddings.image_size
        if rows != columns:
            return f"transformers' BeitModel has absolute positions for square images only, not {rows} x {columns}"
        return None

    def as_native(self) -> tuple[BeitConfig, dict[str, torch.Tensor]]:
        """Return config and weights of the image path, a `BeitModel`."""
        weights = {
            name: value
            for name, value in self.state_dict().items()
            if _EXPERTS not in name and not name.startswith("text_embeddings.")
        }
        return copy.deepcopy(self.config), weights

    def text_as_native(self) -> RobertaPreLayerNormModel:
        """Return the text path; its `pooler_output` is the class token times `POOLER_SCALE`."""
        assert self.text_config is not None
        assert self.text_embeddings is not None
        assert self.native_root_problem is None
        native = RobertaPreLayerNormModel(copy.deepcopy(self.text_config))
        width, ours = self.text_config.hidden_size, self.text_embeddings
        positions = native.embeddings.position_embeddings.weight.detach().zero_()
        positions[-max_text_length(self.text_config) :] = ours.position_embeddings[0]
        state = {
            "embeddings.word_embeddings.weight": ours.word_embeddings.weight,
            "embeddings.position_embeddings.weight": positions,
            "embeddings.token_type_embeddings.weight": torch.zeros(1, width),
            "pooler.dense.weight": POOLER_SCALE * torch.eye(width),
            "pooler.dense.bias": torch.zeros(width),
            **_renamed(ours.layernorm, "embeddings.LayerNorm"),
            **_renamed(self.layernorm, "LayerNorm"),
        }
        layer: Any
        for number, layer in enumerate(self.layers):
            expert, name = layer.experts["text"], f"encoder.layer.{number}"
            parts = {
                "attention.LayerNorm": layer.layernorm_before,
                "attention.self.query": layer.attention.q_proj,
                "attention.self.key": layer.attention.k_proj,
                "attention.self.value": layer.attention.v_proj,
                "attention.output.dense": layer.attention.o_proj,
                "intermediate.LayerNorm": expert.layernorm,
                "intermediate.dense": expert.mlp.fc1,
                "output.dense": expert.mlp.fc2,
            }
            for part, module in parts.items():
                state |= _renamed(module, f"{name}.{part}")
            state[f"{name}.attention.self.key.bias"] = torch.zeros(width)  # BEiT's keys have none
        native.load_state_dict(state, strict=True)
        native.eval()
        return native


def max_text_length(config: RobertaPreLayerNormConfig) -> int:
    """Return the most tokens of a text; native positions begin after the number of the padding token."""
    assert config.pad_token_id is not None
    return config.max_position_embeddings - config.pad_token_id - 1


def _after_layernorm(linear: nn.Linear, width: int, config: BeitConfig) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width, eps=config.layer_norm_eps), linear)


def _renamed(module: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}
