"""What leaves this project in other forms: native and back, timm's names and back, ONNX, the decoder alone."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import model_class, tiny_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hub.convert import __main__ as convert
from hub.encoder_states import native_state
from hub.export.__main__ import main
from hub.export.native import export
from hub.export.onnx import has_dynamic_image_size
from hub.export.timm import timm_state
from hub.export.timm_shapes import timm_shapes

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}
ABSOLUTE = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}


def moved(model):
    """Every weight away from where it starts, so that nothing agrees by accident."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def native_models():
    classes = {"num_labels": 5}
    return {
        "vit": ViTModel(ViTConfig(**SIZES)),
        "vit_rectangle": ViTModel(ViTConfig(**{**SIZES, "image_size": [32, 48]}, qkv_bias=False)),
        "vit_classifier": ViTForImageClassification(ViTConfig(**SIZES, **classes)),
        "beit_shared": BeitModel(
            BeitConfig(**SIZES, use_shared_relative_position_bias=True, use_mask_token=True, use_mean_pooling=False)
        ),
        "beit_blocks_mean": BeitForImageClassification(
            BeitConfig(**SIZES, use_relative_position_bias=True, **classes)
        ),
        "beit_absolute": BeitModel(BeitConfig(**SIZES, **ABSOLUTE)),
        "swin": SwinModel(SwinConfig(**SWIN)),
        "swin_classifier": SwinForImageClassification(SwinConfig(**SWIN, **classes)),
    }


def output_of(command, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command([str(argument) for argument in arguments])
    return printed.getvalue()


def exported(variant, folder, **encoder):
    head = moved(tiny_model(variant, **encoder))
    assert export(head, folder, method=head.config.model_type.removeprefix("mim_"), recipe={}) is None
    return head


def test_native__and_back_is_bitwise(variant, tmp_path):
    head = exported(variant, tmp_path)
    expected = head.exported_encoder.state_dict()
    native = AutoModel.from_pretrained(tmp_path)
    family, host = native.config.model_type, head.config.encoder_config.model_type
    root, _ = native_state(native.state_dict(), family, True, host)  # data2vec's class has other names
    again = type(head)(head.config).encoder
    missing, unexpected = again.load_state_dict(root, strict=False)
    assert set(missing) <= {"embeddings.mask_token"}  # AutoModel builds a Swin without one
    assert all(name.startswith("pooler.") for name in unexpected)  # an identity
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items() if name not in missing
    )
    whole = model_class(variant).from_pretrained(tmp_path / "pretraining").state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in head.state_dict().items())


def test_native__marks_a_finished_run_last_and_removes_what_a_killed_export_left(tmp_path, monkeypatch):
    moved_files, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (moved_files.append(target.name), replace(path, target)))
    (tmp_path / ".export-abc" / "pretraining").mkdir(parents=True)
    exported("mae", tmp_path)
    assert moved_files[-2:] == ["config.json", "pretraining"]
    assert not list(tmp_path.glob(".export*"))


def test_native__may_be_read_by_everybody_who_may_read_other_files(tmp_path):
    export(tiny_model("mae"), tmp_path, method="mae", recipe={})
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


@pytest.mark.parametrize("name", native_models())
def test_timm__names_and_shapes_are_those_of_its_own_models(name):
    """The list was written by timm 1.0.31 from the arguments that `hub.export.timm` gives."""
    listed = json.loads((Path(__file__).parent / "golden" / "timm_shapes.json").read_text())[name]
    expected = {key: tuple(shape) for key, shape in listed.items()}
    model = native_models()[name]
    state, _ = timm_state(model)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected
    assert timm_shapes(model) == expected


FROM_TIMM = {
    "mae": ["--num_attention_heads", 2],
    "simmim": [],
    "simmim+swin": ["--image_size", 32],
}


@pytest.mark.parametrize("name", FROM_TIMM)
def test_timm__and_back_is_bitwise(name, tmp_path):
    exported(name, tmp_path / "ours")
    printed = output_of(main, tmp_path / "ours", "--timm", tmp_path / "timm.safetensors")
    assert "verified " in printed
    arguments = ["--from", "timm", tmp_path / "timm.safetensors", "--to", tmp_path / "back", *FROM_TIMM[name]]
    output_of(convert.main, *arguments, "--image_stats", "imagenet")
    before, after = (AutoModel.from_pretrained(tmp_path / name) for name in ("ours", "back"))
    weights = before.state_dict()
    lost = weights.keys() - after.state_dict().keys()
    assert lost <= {"embeddings.mask_token"}
    assert all(torch.equal(weights[key], tensor) for key, tensor in after.state_dict().items())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, after = (model.eval()(pixels).last_hidden_state for model in (before, after))
    assert torch.equal(before, after)
    ours, back = (json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("ours", "back"))
    assert ours == back


def test_timm__a_rectangle_is_asked_for_and_returns(tmp_path):
    exported("mae", tmp_path / "ours", image_size=[32, 56])
    output_of(main, tmp_path / "ours", "--timm", tmp_path / "timm.safetensors")
    arguments = ["--from", "timm", tmp_path / "timm.safetensors", "--to", tmp_path / "back", "--image_stats", "half"]
    assert "--image_size 32 56" in output_of(convert.main, "--inspect", tmp_path / "timm.safetensors")
    with pytest.raises(SystemExit, match="--image_size"):
        output_of(convert.main, *arguments, "--num_attention_heads", 2)
    output_of(convert.main, *arguments, "--num_attention_heads", 2, "--image_size", 32, 56)
    assert AutoModel.from_pretrained(tmp_path / "back").config.image_size == [32, 56]


def test_timm__a_rectangle_that_could_be_a_square_is_told(tmp_path):
    """4 x 6 patches and the class token's position are as many as 5 x 5 without it."""
    exported("mae", tmp_path / "ours", image_size=[32, 48])
    output_of(main, tmp_path / "ours", "--timm", tmp_path / "timm.safetensors")
    arguments = ["--from", "timm", tmp_path / "timm.safetensors", "--image_stats", "half", "--num_attention_heads", 2]
    assert "its 25 positions are read as a square" in output_of(convert.main, *arguments, "--to", tmp_path / "square")
    printed = output_of(convert.main, *arguments, "--to", tmp_path / "back", "--image_size", 32, 48)
    assert "square" not in printed
    ours, back = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "back"))
    assert all(torch.equal(ours[key], tensor) for key, tensor in back.items())


def timm_vit(**changes):
    """As timm writes a ViT: from our names, with what a variant has more."""
    state, _ = timm_state(moved(ViTModel(ViTConfig(**SIZES))))
    return {key: tensor for key, tensor in {**state, **changes}.items() if tensor is not None}


@torch.no_grad()
def test_timm__layer_scale_and_a_class_token_without_position_are_held_by_a_beit(tmp_path):
    """As in timm's deit3; the command compares the result with the weights themselves."""
    scales = {f"blocks.{b}.ls{i}.gamma": torch.rand(32) for b in range(2) for i in (1, 2)}
    state = timm_vit(**scales)
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "file.pth")
    flags = ["--num_attention_heads", 2, "--image_stats", "half"]
    printed = output_of(convert.main, "--from", "timm", tmp_path / "file.pth", "--to", tmp_path / "out", *flags)
    assert "verified against the file's weights" in printed
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(model, BeitModel)
    assert not model.embeddings.position_embeddings[0, 0].any()
    assert "mim_method" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_timm__layer_scale_of_a_rectangle_has_no_native_class(tmp_path):
    scales = {f"blocks.{b}.ls{i}.gamma": torch.rand(32) for b in range(2) for i in (1, 2)}
    torch.save(timm_vit(pos_embed=torch.rand(1, 29, 32), **scales), tmp_path / "file.pth")
    flags = ["--num_attention_heads", 2, "--image_stats", "half", "--image_size", 32, 56]
    with pytest.raises(SystemExit, match=r"only accepts square images, not \[32, 56\]"):
        output_of(convert.main, "--from", "timm", tmp_path / "file.pth", "--to", tmp_path / "out", *flags)


@torch.no_grad()
def test_timm__norm_behind_the_mean_becomes_the_poolers(tmp_path):
    norm = {"fc_norm.weight": 1 + torch.rand(32), "fc_norm.bias": torch.rand(32)}
    torch.save(timm_vit(**norm, **{"norm.weight": None, "norm.bias": None}), tmp_path / "file.pth")
    flags = ["--num_attention_heads", 2, "--image_stats", "half"]
    output_of(convert.main, "--from", "timm", tmp_path / "file.pth", "--to", tmp_path / "out", *flags)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = AutoModel.from_pretrained(tmp_path / "out").eval()(pixels)
    mean = output.last_hidden_state[:, 1:].mean(1)
    expected = torch.nn.functional.layer_norm(mean, (32,), *norm.values(), 1e-6)
    torch.testing.assert_close(output.pooler_output, expected)


@pytest.mark.parametrize(
    ("key", "part"),
    [("reg_token", "register tokens"), ("dist_token", "distillation"), ("norm_pre.weight", "a norm before")],
)
def test_timm__parts_that_no_native_class_has_are_named(key, part, tmp_path):
    torch.save(timm_vit(**{key: torch.zeros(1, 1, 32)}), tmp_path / "file.pth")
    flags = ["--num_attention_heads", 2, "--image_stats", "half"]
    with pytest.raises(SystemExit, match=rf"{part}.*{key}"):
        output_of(convert.main, "--from", "timm", tmp_path / "file.pth", "--to", tmp_path / "out", *flags)


def test_timm__another_activation_is_refused(tmp_path):
    moved(ViTModel(ViTConfig(**SIZES, hidden_act="relu"))).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="relu"):
        output_of(main, tmp_path, "--timm", tmp_path / "timm.safetensors")
    assert not (tmp_path / "timm.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("variant", "is_free"),
    [
        ("mae", True),
        pytest.param("beit", False, marks=pytest.mark.slow),
        pytest.param("simmim+swin", False, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnx__computes_the_same_at_other_batches_and_sizes(variant, is_free, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exported(variant, tmp_path / "ours")
    file = tmp_path / "encoder.onnx"
    printed = output_of(main, tmp_path / "ours", "--onnx", file)
    assert "verified with onnxruntime on 1 and 3 images" in printed
    assert ("any multiple of the patch" in printed) == is_free
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "ours"]
    session = onnxruntime.InferenceSession(file)
    encoder = AutoModel.from_pretrained(tmp_path / "ours").eval()
    how = {"interpolate_pos_encoding": True} if is_free else {}
    for shape in [(1, 32, 32), (5, 32, 32), *([(2, 48, 48), (3, 16, 40)] if is_free else [])]:
        pixels = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0))
        expected = encoder(pixels, **how)
        names = ["last_hidden_state", "pooler_output"]
        for name, computed in zip(names, session.run(names, {"pixel_values": pixels.numpy()}), strict=True):
            np.testing.assert_allclose(computed, expected[name].numpy(), rtol=1e-4, atol=1e-5)
    if not is_free:
        with pytest.raises(Exception, match="invalid dimensions"):
            session.run(None, {"pixel_values": np.zeros((1, 3, 48, 48), np.float32)})


def test_onnx__image_size_is_free_only_where_positions_can_be_interpolated():
    free = {name for name, model in native_models().items() if has_dynamic_image_size(model.config)}
    assert free == {"vit", "vit_classifier", "beit_absolute"}


def test_decoder__holds_all_but_the_encoder_and_says_what_it_is(variant, tmp_path):
    head = exported(variant, tmp_path / "ours")
    output_of(main, tmp_path / "ours", "--decoder", tmp_path / "decoder")
    tensors = load_file(tmp_path / "decoder" / "decoder.safetensors")
    expected = {key: tensor for key, tensor in head.state_dict().items() if not key.startswith(f"{head.exported}.")}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    text = (tmp_path / "decoder" / "README.md").read_text()
    assert all(f"| `{key}` | {' x '.join(map(str, tensor.shape))} |" in text for key, tensor in expected.items())
    assert re.search(rf"`{type(head).__module__.split('.')[-1]}\.py`", text)
    assert str(tmp_path) not in text


def test_decoder__an_encoder_alone_has_none(tmp_path):
    ViTModel(ViTConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="an encoder alone has no decoder"):
        output_of(main, tmp_path, "--decoder", tmp_path / "decoder")
