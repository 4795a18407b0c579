"""SimMIM against the numbers of the authors' own code (tests/golden), and what its page promises."""

import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import tiny_arguments, tiny_images
from safetensors.torch import load_file
from torch.testing import assert_close

from data.masks import random_unit_mask
from hub.convert import __main__ as convert
from hub.convert.weight_file import open_weights
from modeling.mae import MaeForPreTraining, SimMimAsymmetricConfig, SimMimAsymmetricForPreTraining
from modeling.patches import unpatchify
from modeling.simmim import SimMimConfig, SimMimForPreTraining
from training.trainer import MimTrainer

GOLDEN = Path(__file__).parent / "golden"
RELATIVE = {"rtol": 1e-4, "atol": 1e-6}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
VIT |= {"patch_size": 8, "drop_path_rate": 0.0}
SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SWIN |= {"image_size": 32, "patch_size": 4}


@pytest.fixture(scope="module", params=["simmim_vit", "simmim_swin"])
def golden(request, tmp_path_factory):
    """The authors' file through the converter's command line, loaded back from `pretraining/`, and their numbers."""
    out = tmp_path_factory.mktemp("converted")
    convert.main(["--from", "simmim", str(GOLDEN / f"{request.param}.pth"), "--to", str(out)])
    model = SimMimForPreTraining.from_pretrained(out / "pretraining")
    return model, load_file(GOLDEN / f"{request.param}.safetensors")


def test_golden__loss_and_gradient_equal_the_authors(golden):
    model, expected = golden
    output = model(expected["pixel_values"], expected["mask"].flatten(1).bool())
    output.loss.backward()
    gradient = model.encoder.embeddings.mask_token.grad
    assert_close(output.loss, expected["loss"].squeeze(), **RELATIVE)
    assert_close(gradient, expected["grad.mask_token"], rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@torch.no_grad()
def test_golden__encoder_map_and_reconstruction_equal_the_authors(golden):
    model, expected = golden
    mask = expected["mask"].flatten(1).bool()
    tokens = model.encoder(expected["pixel_values"], bool_masked_pos=mask).last_hidden_state
    authors_map = expected["encoder_map"]  # (B, D, h, w)
    tokens = tokens[:, -authors_map[0, 0].numel() :]
    assert_close(tokens, authors_map.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    side, grid = model.config.prediction_side, authors_map.shape[2:]
    assert_close(unpatchify(model.decoder(tokens), side, grid), expected["reconstruction"], rtol=1e-4, atol=1e-5)
    cells = model.masked_units(mask)
    hidden = cells.view(-1, 1, *grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    predicted = model.predicted_units(model(expected["pixel_values"], mask).logits, cells)
    shown = unpatchify(predicted, side, grid)
    assert_close(shown, expected["reconstruction"] * hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("encoder.mask_token", "incomplete SimMIM: encoder.mask_token missing"),
        ("decoder.0.weight", "incomplete SimMIM: decoder.0.weight missing"),
        ("encoder.norm.weight", "missing encoder.norm.weight"),
        (None, "unexpected encoder.surprise, other"),
    ],
)
def test_converter__accounts_for_every_key(key, problem, tmp_path):
    state = torch.load(GOLDEN / "simmim_vit.pth", weights_only=True)["model"]
    if key is None:
        state |= {"encoder.surprise": torch.zeros(1), "other": torch.zeros(1)}
    else:
        del state[key]
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(SystemExit, match=problem):
        convert.main(["--from", "simmim", str(tmp_path / "file.pth"), "--to", str(tmp_path / "out")])


def test_converter__asks_for_the_image_size_only_where_the_file_has_none(tmp_path):
    state = torch.load(GOLDEN / "simmim_swin.pth", weights_only=True)["model"]
    state = {key: tensor for key, tensor in state.items() if not key.endswith("attn_mask")}
    torch.save({"model": state}, tmp_path / "file.pth")
    arguments = ["--from", "simmim", str(tmp_path / "file.pth"), "--to", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--image_size"):
        convert.main(arguments)
    convert.main([*arguments, "--image_size", "128"])
    model = SimMimForPreTraining.from_pretrained(tmp_path / "out" / "pretraining")
    expected = load_file(GOLDEN / "simmim_swin.safetensors")
    assert_close(model(expected["pixel_values"], expected["mask"].flatten(1).bool()).loss, expected["loss"].squeeze())


def test_converter__reads_the_authors_own_files_without_their_settings_class(tmp_path, monkeypatch):
    """Their files hold a yacs CfgNode beside the weights, which plain `weights_only` refuses."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    settings = yacs.CfgNode(MODEL=yacs.CfgNode(TYPE="vit"))
    settings.__dict__["__immutable__"] = True
    torch.save({"model": {"weight": torch.ones(2)}, "config": settings}, tmp_path / "file.pth")
    monkeypatch.undo()
    assert torch.equal(open_weights(tmp_path / "file.pth").states["model"]["weight"], torch.ones(2))


@pytest.mark.parametrize(("pixel_loss", "expected"), [("l1", 0.5), ("l2", 0.25), ("smooth_l1", 0.125)])
def test_loss__of_a_constant_error_is_that_error_whatever_is_hidden(pixel_loss, expected):
    model = SimMimForPreTraining(SimMimConfig(encoder_config=VIT, pixel_loss=pixel_loss))
    for num_cells in (1, 7):
        cells = torch.randn(num_cells, 192, generator=torch.Generator().manual_seed(0))
        assert model.pixel_loss(cells + 0.5, cells).item() == pytest.approx(expected, rel=1e-5)


def test_norm_pix__zero_prediction_of_a_constant_cell_is_right():
    model = SimMimForPreTraining(SimMimConfig(encoder_config=VIT, pixel_loss="l2", norm_pix_loss=True))
    noise = torch.randn(400, 192, generator=torch.Generator().manual_seed(0))
    assert model.pixel_loss(torch.zeros_like(noise), noise).item() == pytest.approx(191 / 192, abs=1e-4)
    assert model.pixel_loss(torch.zeros(1, 192), torch.full((1, 192), 0.7)).item() == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_unequal_counts__every_hidden_pixel_of_the_batch_counts_alike():
    model = SimMimForPreTraining(SimMimConfig(encoder_config=VIT)).eval()
    images = photographs(2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :3], mask[1, :9] = True, True
    alone = [model(images[i : i + 1], mask[i : i + 1]).loss.item() for i in (0, 1)]
    assert model(images, mask).loss.item() == pytest.approx((3 * alone[0] + 9 * alone[1]) / 12, rel=1e-5)
    assert model(images, mask, num_masked_patches=12).logits.shape == (12, 192)


def test_swin__mask_that_cuts_a_cell_is_refused():
    model = SimMimForPreTraining(SimMimConfig(encoder_config=SWIN))
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, :2] = True  # half of the 2 x 2 patches that become one token
    with pytest.raises(ValueError, match="merges 2 x 2 patches into one token"):
        model(photographs(1), mask)
    mask[0, 8:10] = True
    assert torch.isfinite(model(photographs(1), mask).loss)


@pytest.mark.parametrize("settings", [VIT, SWIN], ids=["vit", "swin"])
def test_compile__is_one_graph(settings):
    model = SimMimForPreTraining(SimMimConfig(encoder_config=settings)).eval()
    grid = (32 // settings["patch_size"],) * 2
    masks = [random_unit_mask(grid, 0.6, torch.Generator().manual_seed(i), unit=grid[0] // 4) for i in (0, 1)]
    mask = torch.stack(masks)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(photographs(2), mask, int(mask.sum())).loss, model(photographs(2), mask).loss)


def test_weight_decay__spares_what_the_authors_spare(tmp_path):
    for settings, spared in ((VIT, {"cls_token"}), (SWIN, {"mask_token", "relative_position_bias_table"})):
        head = SimMimForPreTraining(SimMimConfig(encoder_config=settings))
        trainer = MimTrainer(model=head, args=tiny_arguments(tmp_path))
        decayed = {name.rsplit(".", 1)[-1] for name in trainer.get_decay_parameter_names(head)}
        matrices = {name.rsplit(".", 1)[-1] for name, p in head.named_parameters() if p.ndim > 1}
        assert matrices - decayed == spared


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_loss": "l3"}, "pixel_loss is 'l3', expected one of l1, l2, smooth_l1"),
        ({"encoder_config": {"model_type": "vit"}}, "not a vit"),
        ({"encoder_config": {**SWIN, "image_size": 36}}, "36 x 36 is not a multiple of patch size 8"),
    ],
)
def test_config__refuses_what_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SimMimConfig(**settings)


def test_asymmetric__is_an_mae_with_a_larger_mask_token():
    config = SimMimAsymmetricConfig(encoder_config={k: v for k, v in VIT.items() if k != "drop_path_rate"})
    model = SimMimAsymmetricForPreTraining(config)
    assert model.mask_token.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert config.norm_pix_loss is False
    assert isinstance(model, MaeForPreTraining)


def photographs(num_images: int) -> torch.Tensor:
    images = tiny_images(num_images)
    return torch.stack([images[i]["pixel_values"] for i in range(num_images)])
