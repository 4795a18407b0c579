"""`--init_from`: training goes on from the features of another model, or says why it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close
from transformers import (
    AutoModel,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hub.export.native import export
from hub.init_from import open_starting_model
from hub.init_weights import read_weights
from modeling import CONFIGS, MODELS
from modeling.patches import patchify, sincos_positions

PHOTOGRAPHS = sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}
DINO = {**{name: value for name, value in SIZES.items() if name != "intermediate_size"}, "mlp_ratio": 2}
SHARED_BIAS = {"use_shared_relative_position_bias": True}
OWN_BIAS = {"use_relative_position_bias": True}
ABSOLUTE = {"use_absolute_position_embeddings": True}


def vit_mae(**changes: Any) -> ViTMAEForPreTraining:
    """As loaded from the Hub: with the tables that a fresh one lacks."""
    model = ViTMAEForPreTraining(ViTMAEConfig(**{**SIZES, **DECODER, **changes}))
    model.vit.embeddings.position_embeddings.data = sincos_positions((4, 4), 32)
    model.decoder.decoder_pos_embed.data = sincos_positions((4, 4), 16)
    return model


METHODS = ("mae", "simmim-asymmetric", "simmim", "beit", "data2vec", "data2vec2", "ibot", "dinov2")
VIT_LIKE = " ".join(METHODS)
AS_IT_IS = "mae simmim-asymmetric data2vec ibot dinov2"  # methods that train natively what no ViT can represent
PROTOTYPES = {"num_prototypes": 24, "head_hidden_size": 16, "head_bottleneck_size": 16}
BEIT_LIKE = "simmim beit data2vec"
# Every kind of source with the methods that can go on from it.
SOURCES: dict[str, tuple[Any, str]] = {
    "ViT": (lambda: ViTModel(ViTConfig(**SIZES)), VIT_LIKE),
    "ViT without biases": (lambda: ViTModel(ViTConfig(**SIZES, qkv_bias=False)), VIT_LIKE),
    "ViT classifier": (lambda: ViTForImageClassification(ViTConfig(**SIZES)), VIT_LIKE),
    "ViT with mask token": (lambda: ViTForMaskedImageModeling(ViTConfig(**SIZES, encoder_stride=8)), VIT_LIKE),
    "ViTMAE": (vit_mae, VIT_LIKE),
    "DeiT": (lambda: DeiTModel(DeiTConfig(**SIZES)), "simmim beit"),
    "DeiT classifier": (lambda: DeiTForImageClassification(DeiTConfig(**SIZES)), "simmim beit"),
    "BEiT": (lambda: BeitModel(BeitConfig(**SIZES, **SHARED_BIAS)), BEIT_LIKE),
    "BEiT in pre-training": (lambda: BeitForMaskedImageModeling(BeitConfig(**SIZES, **SHARED_BIAS)), BEIT_LIKE),
    "BEiT classifier": (lambda: BeitForImageClassification(BeitConfig(**SIZES, **OWN_BIAS)), BEIT_LIKE),
    "BEiT like a ViT": (
        lambda: BeitModel(BeitConfig(**SIZES, **ABSOLUTE, use_mean_pooling=False)),
        VIT_LIKE,
    ),
    "DINOv2": (lambda: Dinov2Model(Dinov2Config(**DINO)), VIT_LIKE),
    "DINOv2 without mask token": (lambda: Dinov2Model(Dinov2Config(**DINO, use_mask_token=False)), VIT_LIKE),
    "DINOv2 classifier": (lambda: Dinov2ForImageClassification(Dinov2Config(**DINO)), VIT_LIKE),
    "DINOv2 with SwiGLU": (lambda: Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=True)), AS_IT_IS),
    "DINOv2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        AS_IT_IS,
    ),
    "DINOv3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=3)), AS_IT_IS),
    "DINOv3 with SwiGLU": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, use_gated_mlp=True, key_bias=True)),
        AS_IT_IS,
    ),
    "Data2VecVision": (lambda: Data2VecVisionModel(Data2VecVisionConfig(**SIZES, **SHARED_BIAS)), BEIT_LIKE),
    "Data2VecVision, a table a block": (
        lambda: Data2VecVisionModel(Data2VecVisionConfig(**SIZES, **OWN_BIAS, use_mean_pooling=False)),
        BEIT_LIKE,
    ),
    "Swin": (lambda: SwinModel(SwinConfig(**SWIN)), "simmim"),
    "Swin in pre-training": (lambda: SwinForMaskedImageModeling(SwinConfig(**SWIN, encoder_stride=8)), "simmim"),
}
PAIRS = [(kind, method) for kind, (_, methods) in SOURCES.items() for method in methods.split()]
REFUSED = [
    (kind, method) for kind, (_, methods) in SOURCES.items() for method in METHODS if method not in methods.split()
]


@torch.no_grad()
def saved(folder: Path, kind: str) -> PreTrainedModel:
    """A source with random weights everywhere, so that no part of it can be lost unseen."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = SOURCES[kind][0]()
    for name, parameter in model.named_parameters():
        if kind == "ViTMAE" and "pos" in name:
            continue
        around = 1.0 if name.endswith(("layernorm.weight", "norm.weight", "norm1.weight", "norm2.weight")) else 0.0
        parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def pixels(size: int | tuple[int, int] = 32) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.linspace(-2, 2, 2 * 3 * height * width).sin().reshape(2, 3, height, width)


def features_of(model: PreTrainedModel, images: torch.Tensor, **options: Any) -> torch.Tensor:
    """What the source itself hands to a head."""
    with torch.no_grad():
        if isinstance(model, ViTMAEForPreTraining):
            vit = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
            vit.load_state_dict(model.vit.state_dict())
            return vit.eval()(images, **options).last_hidden_state
        encoder = model if isinstance(model, DINOv3ViTModel) else model.base_model  # there only its blocks
        base = encoder(images, **options).last_hidden_state
        return model.layernorm(base) if isinstance(model, BeitForMaskedImageModeling) else base


def continued(folder: Path | str, method: str, repair: bool = False, **changes: Any) -> tuple[Any, list[str]]:
    """The head that a run would begin with, and what is said."""
    start = open_starting_model(str(folder), method)
    flags = {**(PROTOTYPES if method in ("ibot", "dinov2") else {}), **start.fixed, **start.defaults, **changes}
    own = {name: flags.pop(name) for name in ("image_size", "patch_size", "num_channels")}
    flags.pop("image_stats", None)
    head = MODELS[method](CONFIGS[method](encoder_config={**start.encoder, **own}, **flags, **start.image_stats))
    weights = read_weights(start, head, repair)
    head.load_state_dict(weights.state, strict=False)
    return head.eval(), weights.notes


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_pair__has_the_features_of_the_source(kind, method, tmp_path):
    source = saved(tmp_path, kind)
    head, _ = continued(tmp_path, method)
    with torch.no_grad():
        found = head.encoder(pixels()).last_hidden_state
    assert_close(found, features_of(source, pixels()), rtol=1e-5, atol=1e-5)


AS_IT_IS_PAIRS = [
    (kind, method)
    for kind in ("ViT", "DINOv2", "DINOv2 with SwiGLU", "DINOv2 with registers", "DINOv3")
    for method in ("mae", "dinov2", "ibot", "data2vec", "feature")
]


@pytest.mark.parametrize(("kind", "method"), AS_IT_IS_PAIRS)
def test_native_encoder__keeps_its_class_and_computes_in_training_what_the_source_computes(kind, method, tmp_path):
    source = saved(tmp_path / "source", kind)
    head, notes = continued(tmp_path / "source", method, image_size=24)  # smaller than the source's
    options = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    images, encoder = pixels(24), head.encoder
    expected = features_of(source, images, **options)
    with torch.no_grad():
        if method == "mae":
            visible = torch.arange(9).flip(0).expand(2, -1)  # all patches, in another order
            found = encoder.encode(patchify(images, 8).flip(1), visible)[-1]
            expected = torch.cat([expected[:, :-9], expected[:, -9:].flip(1)], dim=1)
        else:
            found = encoder.tokens(images)
            if method == "data2vec":
                last = encoder.last_blocks(images, 1)[0]
                assert_close(encoder.normalize(last), found)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any("folded" in note for note in notes)
    head.after_loading_encoder()  # as a run does: the teacher is what is exported
    export(head, tmp_path / "out", method=method, recipe={})
    left = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(left) is type(source)
    assert_close(left(images).last_hidden_state, features_of(source, images, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["mae", "dinov2", "ibot", "data2vec"])
def test_patch_14__is_trained_as_well(method, tmp_path):
    config = Dinov2Config(**{**DINO, "patch_size": 14, "image_size": 70})
    torch.manual_seed(0)
    source = Dinov2Model(config).eval()
    source.save_pretrained(tmp_path)
    head, _ = continued(tmp_path, method, image_size=56)  # smaller than the source's
    with torch.no_grad():
        assert_close(head.encoder(pixels(56)).last_hidden_state, features_of(source, pixels(56)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "method"), REFUSED)
def test_pair__that_cannot_be_exact_is_refused_with_the_reason_and_the_others(kind, method, tmp_path):
    saved(tmp_path, kind)
    with pytest.raises(ValueError, match="cannot continue from") as refusal:
        open_starting_model(str(tmp_path), method)
    possible = SOURCES[kind][1].split()
    methods = str(refusal.value).split("Methods that can: ")[1].split(". ")[0]
    assert set(methods.split(", ")) >= (set(possible) or {"none"})
    assert f"{method} continues from: " in str(refusal.value)


# ---- heads that are kept ----


def own_run(folder: Path, method: str = "mae") -> Any:
    """A head of ours with random weights, as a run leaves it: encoder at the root, the whole in pretraining/."""
    torch.manual_seed(0)
    kind = SIZES if method != "simmim" else SWIN | {"model_type": "swin"}
    dinov2 = PROTOTYPES | {"num_register_tokens": 3, "shares_heads": True, "centering": "mean"}
    own = {"mae": {**DECODER, "norm_pix_loss": False}, "beit": {"vocab_size": 16}, "dinov2": dinov2}.get(method, {})
    stats = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    head = MODELS[method](CONFIGS[method](encoder_config=kind, **own, **stats))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    export(head, folder, method=method, recipe={})
    return head.eval()


@pytest.mark.parametrize("method", ["mae", "simmim", "beit", "dinov2"])
@pytest.mark.parametrize("part", ["", "pretraining"])
def test_own_output__of_the_same_method_is_taken_over_whole(method, part, tmp_path):
    before = own_run(tmp_path, method)
    vocabulary = {"vocab_size": 16} if method == "beit" else {}
    after, notes = continued(tmp_path / part, method, **vocabulary)
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
    assert len(notes) == 1  # nothing new, nothing left out
    assert list(after.config.image_mean) == [0.4, 0.5, 0.6]


def test_own_output__of_another_method_gives_its_encoder(tmp_path):
    before = own_run(tmp_path, "mae")
    after, notes = continued(tmp_path, "simmim")
    with torch.no_grad():
        expected = before.encoder(pixels()).last_hidden_state
        assert_close(after.encoder(pixels()).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert any(note.startswith("new") and "mask token" in note and "decoder" in note for note in notes)
    assert any(note.startswith("not taken over") and "key biases" in note for note in notes)


def test_own_beit__with_another_tokenizer_begins_with_a_new_last_layer(tmp_path):
    before = own_run(tmp_path, "beit")
    after, notes = continued(tmp_path, "beit", vocab_size=32)
    assert torch.equal(after.encoder.layers[1].mlp.fc2.weight, before.encoder.layers[1].mlp.fc2.weight)
    assert after.lm_head.out_features == 32
    assert any("new" in note and "lm_head" in note for note in notes)


@torch.no_grad()
def test_stock_vit_mae__predicts_the_same_pixels_here_and_after_a_round_trip(tmp_path):
    stock = saved(tmp_path / "stock", "ViTMAE")
    head, notes = continued(tmp_path / "stock", "mae")
    assert len(notes) == 1
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    theirs = stock(pixels(), noise=noise)
    hidden = theirs.mask.bool()
    ours = head(pixels(), hidden)
    assert_close(ours.logits.flatten(0, 1), theirs.logits[hidden], rtol=1e-5, atol=1e-5)
    assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)  # norm_pix_loss is the source's, too
    export(head, tmp_path / "ours", method="mae", recipe={})
    again, _ = continued(tmp_path / "ours", "mae")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in head.state_dict().items())


def test_beit_in_pre_training__keeps_its_last_layer_for_the_same_number_of_tokens(tmp_path):
    source = saved(tmp_path, "BEiT in pre-training")
    head, notes = continued(tmp_path, "beit", vocab_size=8192)
    assert torch.equal(head.lm_head.weight, source.lm_head.weight)
    assert "lm_head" in notes[0]


# ---- other image sizes ----


@pytest.mark.parametrize(
    ("kind", "method"), [("ViT", "mae"), ("ViT", "simmim"), ("DeiT", "simmim"), ("DINOv2", "beit")]
)
def test_resize__of_absolute_positions_gives_what_the_source_gives_at_that_size(kind, method, tmp_path):
    source = saved(tmp_path, kind)
    options = {} if kind == "DINOv2" else {"interpolate_pos_encoding": True}
    head, notes = continued(tmp_path, method, image_size=48)
    with torch.no_grad():
        found = head.encoder(pixels(48)).last_hidden_state
    assert_close(found, features_of(source, pixels(48), **options), rtol=1e-4, atol=1e-5)
    assert "position tables resized from 4 x 4 to 6 x 6 patches" in notes


def test_resize__to_a_rectangle_is_two_dimensional(tmp_path):
    source = saved(tmp_path, "ViT")
    head, _ = continued(tmp_path, "mae", image_size=[16, 64])
    table = head.encoder.embeddings.position_embeddings
    old = source.embeddings.position_embeddings[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    new = torch.nn.functional.interpolate(old, size=(2, 8), mode="bicubic", align_corners=False)
    assert_close(table[:, 1:], new.flatten(2).transpose(1, 2))
    assert torch.equal(table[:, :1], source.embeddings.position_embeddings[:, :1])
    with pytest.raises(ValueError, match="give `image_size` one number"):
        continued(tmp_path, "simmim", image_size=[16, 64])


@pytest.mark.parametrize("kind", ["BEiT", "BEiT classifier", "Data2VecVision"])
def test_resize__of_relative_positions_keeps_the_bias_of_equal_offsets(kind, tmp_path):
    saved(tmp_path, kind)
    small, _ = continued(tmp_path, "simmim")
    large, _ = continued(tmp_path, "simmim", image_size=[32, 64])
    for one, other in zip(position_biases(small), position_biases(large), strict=True):
        before, after = one((4, 4))[0], other((4, 8))[0]  # (heads, 1+N, 1+N)
        assert torch.equal(after[:, 0, 0], before[:, 0, 0])  # from the class token to itself
        assert_close(after[:, 1, 1], before[:, 1, 1])  # from a patch to itself
        assert_close(after[:, 1, 9], before[:, 1, 5])  # to the one below
        assert after.shape[1:] == (33, 33)


def position_biases(head: Any) -> list[Any]:
    return [module for module in head.encoder.modules() if type(module).__name__ == "PositionBias"]


@torch.no_grad()
def test_resize__of_a_swin_keeps_its_windows_where_they_fit(tmp_path):
    source = saved(tmp_path, "Swin")
    head, notes = continued(tmp_path, "simmim", image_size=64)
    expected = source(pixels(64)).last_hidden_state
    assert_close(head.encoder(pixels(64)).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert not any("resized" in note for note in notes)
    smaller, notes = continued(tmp_path, "simmim", image_size=16)  # the last stage has 2 x 2 patches for 4 x 4 windows
    name = "encoder.layers.1.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    middle = source.state_dict()[name].view(7, 7, 4)[2:5, 2:5]
    assert torch.equal(smaller.encoder.state_dict()[name].view(3, 3, 4), middle)
    assert any("resized" in note for note in notes)
