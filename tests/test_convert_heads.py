"""Files of DINO, iBOT and DINOv2: whole models with heads and centers, and encoders, compute what the file says."""

import contextlib
import io
import math
import re

import pytest
import torch
from conftest import model_class, tiny_batch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel

from hub.convert import __main__ as convert

WIDTH, HIDDEN, BOTTLENECK, PROTOTYPES = 32, 24, 16, 40
HEADS = ["--num_attention_heads", "2"]


def drawn(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for key, shape in shapes.items()}


def linear(key, outputs, inputs):
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def backbone(seed, registers=None, gated=False, chunk=""):
    """A ViT of the authors; with `registers`, even 0, a DINOv2, whose blocks may be in chunks."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 17, WIDTH), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 8, 8), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    if registers is not None:
        shapes |= {"mask_token": (1, WIDTH)} | ({"register_tokens": (1, registers, WIDTH)} if registers else {})
    for number in range(2):
        block = {f"norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
        block |= linear("attn.qkv", 3 * WIDTH, WIDTH) | linear("attn.proj", WIDTH, WIDTH)
        if gated:
            block |= linear("mlp.w12", 2 * 48, WIDTH) | linear("mlp.w3", WIDTH, 48)
        else:
            block |= linear("mlp.fc1", 64, WIDTH) | linear("mlp.fc2", WIDTH, 64)
        if registers is not None:
            block |= {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)}
        shapes |= {f"blocks.{chunk}{number}.{key}": shape for key, shape in block.items()}
    return drawn(seed, shapes)


def head(seed, scale=1.0):
    shapes = linear("mlp.0", HIDDEN, WIDTH) | linear("mlp.2", HIDDEN, HIDDEN) | linear("mlp.4", BOTTLENECK, HIDDEN)
    state = drawn(seed, {**shapes, "last_layer.weight_v": (PROTOTYPES, BOTTLENECK)})
    return {**state, "last_layer.weight_g": torch.linspace(1, scale, PROTOTYPES)[:, None]}


def named(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def ibot_file(scale=1.0):
    student = named("module.backbone.", {**backbone(1), "masked_embed": torch.ones(1, WIDTH)})
    teacher = named("backbone.", backbone(2))
    for prefix, seed, state in (("module.head.", 3, student), ("head.", 4, teacher)):
        state |= named(prefix, head(seed, scale))
        state |= {key.replace("last_layer", "last_layer2"): t for key, t in state.items() if "last_layer" in key}
    centers = drawn(5, {"center": (1, PROTOTYPES), "center2": (1, 1, PROTOTYPES)})
    return {"student": student, "teacher": teacher, "epoch": 3, "ibot_loss": centers}


def dino_file(scale=1.0):
    file = ibot_file(scale)
    for state in (file["student"], file["teacher"]):
        for key in [key for key in state if "masked_embed" in key or "last_layer2" in key]:
            del state[key]
    centers = file.pop("ibot_loss")
    return {**file, "dino_loss": {"center": centers["center"]}}


def dinov2_file(scale=1.0, registers=2):
    state = {}
    for network, seed in (("student.", 10), ("teacher.", 20)):
        state |= named(f"{network}backbone.", backbone(seed, registers, chunk="0."))
        state |= named(f"{network}dino_head.", head(seed + 1, scale)) | named(
            f"{network}ibot_head.", head(seed + 2, scale)
        )
    zero = {"dino_loss.center": torch.zeros(1, PROTOTYPES), "ibot_patch_loss.center": torch.zeros(1, 1, PROTOTYPES)}
    return {"model": {**state, **zero}, "iteration": 7}


FILES = {"ibot": ibot_file, "dino": dino_file, "dinov2": dinov2_file}


def authors_head(state, prefix, tokens):
    for number in (0, 2, 4):
        tokens = F.linear(tokens, state[f"{prefix}mlp.{number}.weight"], state[f"{prefix}mlp.{number}.bias"])
        tokens = F.gelu(tokens) if number < 4 else F.normalize(tokens, dim=-1)
    vectors, lengths = state[f"{prefix}last_layer.weight_v"], state[f"{prefix}last_layer.weight_g"]
    return tokens @ (lengths * vectors / vectors.norm(dim=1, keepdim=True)).T


def converted(content, method, tmp_path, *flags, to="out"):
    """(what was written, what was printed)."""
    torch.save(content, tmp_path / "file.pth")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        convert.main(["--from", method, str(tmp_path / "file.pth"), "--to", str(tmp_path / to), *HEADS, *flags])
    return tmp_path / to, printed.getvalue()


@pytest.mark.parametrize("method", FILES)
@pytest.mark.parametrize("weights", ["teacher", "student"])
@torch.no_grad()
def test_both_networks__heads_and_centers_are_those_of_the_file(method, weights, tmp_path):
    scale = {"teacher": 1.0, "student": 1.5}[weights]
    content = FILES[method](scale)
    out, printed = converted(content, method, tmp_path, "--weights", weights)
    assert "verified against the file's weights" in printed
    model = model_class(method).from_pretrained(out / "pretraining").eval()
    assert model.config.trains_prototype_scale is (scale != 1)
    assert model.config.exported_weights == weights
    assert model.config.centering == ("sinkhorn" if method == "dinov2" else "mean")
    if method == "dinov2":
        whole = content["model"]
        states = {name: {k.removeprefix(f"{name}."): t for k, t in whole.items()} for name in ("student", "teacher")}
        prefixes = {"class_token": "dino_head.", "patch": "ibot_head."}
    else:
        states = {n: {k.removeprefix("module."): t for k, t in content[n].items()} for n in ("student", "teacher")}
        prefixes = {"class_token": "head."}
    tokens = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    for network, heads in (("student", model.heads), ("teacher", model.teacher_heads)):
        assert set(heads) == set(prefixes)
        for name, prefix in prefixes.items():
            assert_close(heads[name](tokens), authors_head(states[network], prefix, tokens))
    for name, center in model.centers.items():
        key = {"class_token": "center", "patch": "center2"}[name]
        assert torch.equal(center.mean, content[f"{method}_loss"][key].flatten())
    assert len(model.centers) == {"ibot": 2, "dino": 1, "dinov2": 0}[method]
    if method == "ibot":
        assert (model.encoder.embeddings.mask_token == 1).all()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exported = {"teacher": model.teacher, "student": model.encoder}[weights]
    assert_close(AutoModel.from_pretrained(out).eval()(pixels).last_hidden_state, exported.tokens(pixels))
    assert model(**tiny_batch(method)).loss.isfinite()


@pytest.mark.parametrize("method", FILES)
def test_inspect__tells_both_networks_and_prints_a_command_for_the_method(method, tmp_path):
    torch.save(FILES[method](), tmp_path / "file.pth")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        convert.main(["--inspect", str(tmp_path / "file.pth")])
    name = {"ibot": "iBOT", "dino": "DINO", "dinov2": "DINOv2"}[method]
    assert f"{name}, student and teacher (--from {method}" in printed.getvalue()
    assert re.search(rf"opens as {model_class(method).__name__}: .*num_prototypes {PROTOTYPES}", printed.getvalue())
    assert "ignored: epoch" in printed.getvalue() or "ignored: iteration" in printed.getvalue()


def without(content, pattern):
    return {
        k: {n: t for n, t in v.items() if not re.search(pattern, n)} if isinstance(v, dict) else v
        for k, v in content.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda file: without(file, r"^center2$"),
        lambda file: without(file, r"^head\.mlp\.4\.bias$"),
        lambda file: file | {"teacher": file["teacher"] | {"head.mlp.1.running_mean": torch.ones(HIDDEN)}},
        lambda file: file | {"student": {k: t * 2 if "last_layer2" in k else t for k, t in file["student"].items()}},
        lambda file: {key: value for key, value in file.items() if key != "student"},
    ],
)
def test_part_of_a_whole_model__gives_the_encoder_and_the_reason(change, tmp_path):
    out, printed = converted(change(ibot_file()), "ibot", tmp_path)
    assert not (out / "pretraining").exists()
    assert "the projection head of pre-training, which needs both networks" in printed
    assert (out / "config.json").exists()


@pytest.mark.parametrize(("registers", "gated"), [(0, False), (2, False), (2, True)])
def test_dinov2__released_backbones_are_native(registers, gated, tmp_path):
    out, printed = converted(backbone(1, registers, gated), "dinov2", tmp_path)
    assert "verified against the file's weights: relative error" in printed
    model = AutoModel.from_pretrained(out)
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    assert torch.equal(model.embeddings.mask_token, backbone(1, registers, gated)["mask_token"])


def test_centers__of_zero_before_the_first_step_are_centers_of_ibot(tmp_path):
    content = ibot_file()
    content["ibot_loss"] = {name: torch.zeros_like(center) for name, center in content["ibot_loss"].items()}
    out, _ = converted(content, "ibot", tmp_path)
    assert model_class("ibot").from_pretrained(out / "pretraining").config.centering == "mean"


def test_dinov2__without_registers_too_is_whole(tmp_path):
    out, _ = converted(dinov2_file(registers=0), "dinov2", tmp_path)
    assert model_class("dinov2").from_pretrained(out / "pretraining").config.num_register_tokens == 0
