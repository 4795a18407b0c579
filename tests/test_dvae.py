"""The discrete VAE: its densities and divergences, the original's blocks, and what comes back after saving."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import tiny_images
from torch import nn
from transformers import AutoModel, FlavaImageCodebook, FlavaImageCodebookConfig

from data.seeds import seeded_generator
from modeling.dvae import (
    CodebookUse,
    DvaeBlock,
    DvaeConfig,
    DvaeModel,
    gumbel_softmax,
    kl_from_uniform,
    kl_of_mean_from_uniform,
    logit_laplace_loss,
    map_pixels,
    unmap_pixels,
)
from modeling.schedules import Schedule
from training.codebook_start import start_from_images
from training.weight_average import WeightAverage

TINY = {"image_size": 32, "vocab_size": 16, "hidden_size": 8, "num_blocks_per_group": 1, "decoder_input_size": 8}


def tiny_dvae(**changes) -> DvaeModel:
    torch.manual_seed(0)
    return DvaeModel(DvaeConfig(**{**TINY, **changes}))


def photographs(num_images: int = 8) -> torch.Tensor:
    images = tiny_images()
    return torch.stack([images[index]["pixel_values"] for index in range(num_images)])


# ---- formulas ----


def test_kl__is_0_for_uniform_and_ln_k_for_one_sure_code():
    assert kl_from_uniform(torch.zeros(1, 512, 2, 2)).abs().max() < 1e-5
    sure = torch.zeros(1, 512, 2, 2)
    sure[:, 7] = 1e4
    assert kl_from_uniform(sure) == pytest.approx(torch.full((1, 2, 2), math.log(512)))


def test_kl_of_mean__is_0_when_sure_codes_are_used_equally_often_and_ln_k_when_one_always_is():
    sure = 1e4 * torch.eye(16).view(1, 16, 4, 4)
    assert kl_of_mean_from_uniform(sure).abs() < 1e-5
    assert kl_of_mean_from_uniform(sure[:, :, :1, :1]) == pytest.approx(math.log(16))


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -1.0), (1.5, -2.0), (-0.7, 0.0)])
def test_logit_laplace__is_a_density_on_0_to_1(mean, log_scale):
    logits = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    pixels = logits.sigmoid()  # dense where the density may be steep
    inside = (pixels > 0) & (pixels < 1)
    pixels = pixels[inside].view(1, 1, 1, -1)
    maps = torch.tensor([mean, log_scale], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 1, pixels.shape[-1])
    density = (-logit_laplace_loss(maps, pixels)).exp()
    assert torch.trapezoid(density.flatten(), pixels.flatten()).item() == pytest.approx(1, abs=1e-4)


def test_pixel_mapping__lies_in_the_inner_eight_tenths_and_is_undone():
    pixels = photographs()
    mapped = map_pixels(pixels)
    assert torch.allclose(unmap_pixels(mapped), pixels / 255, atol=1e-6)
    assert torch.equal(mapped, map_pixels(pixels / 255))
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


def test_gumbel_softmax__is_soft_and_sharpens_as_the_temperature_falls():
    logits = torch.randn(2, 512, 4, 4, generator=torch.Generator().manual_seed(0))
    largest = []
    for temperature in (1.0, 1 / 16):
        torch.manual_seed(1)
        sample = gumbel_softmax(logits, temperature)
        assert torch.allclose(sample.sum(1), torch.ones(2, 4, 4))
        largest.append(sample.amax(1).mean().item())
    assert largest[0] < 0.5 < 0.8 < largest[1] < 1


def test_gumbel_softmax__draws_codes_with_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 200, 200)
    torch.manual_seed(0)
    drawn = gumbel_softmax(logits, 1.0).argmax(1).flatten().bincount(minlength=3) / 40_000
    assert torch.allclose(drawn, logits[0, :, 0, 0].softmax(0), atol=0.01)


def test_schedules__start_end_and_pass_the_middle_like_a_cosine():
    kl_weight, temperature = Schedule(0.0, 6.6, 5000), Schedule(1.0, 1 / 16, 150_000)
    assert (kl_weight.at(0), temperature.at(0)) == (0.0, 1.0)
    assert kl_weight.at(2500) == pytest.approx(3.3)
    assert temperature.at(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert (kl_weight.at(150_000), temperature.at(150_000)) == (6.6, 1 / 16)
    assert (kl_weight.at(10**7), temperature.at(10**7)) == (6.6, 1 / 16)
    assert Schedule(1.0, 0.0, 100).at(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert Schedule(0.0, 6.6, 0).at(0) == 6.6


def test_codebook_use__counts_codes_and_their_perplexity():
    assert CodebookUse.of(torch.tensor([5, 5, 0, 5, 5])) == CodebookUse(20, 4, pytest.approx(4))
    assert CodebookUse.of(torch.tensor([0, 9])) == CodebookUse(9, 1, pytest.approx(1))


# ---- the original's architecture ----


def test_original__has_the_published_widths():
    with torch.device("meta"):
        model = DvaeModel(DvaeConfig())
        logits = model.encode(torch.empty(1, 3, 256, 256))
        maps = model._decode_maps(model._embed_soft(logits))
    widths = [model.get_parameter(f"encoder.group_{n}.0.residual.7.weight").shape[0] for n in range(1, 5)]
    assert widths == [256, 512, 1024, 2048]
    widths = [model.get_parameter(f"decoder.group_{n}.0.residual.7.weight").shape[0] for n in range(1, 5)]
    assert widths == [2048, 1024, 512, 256]
    assert (logits.shape, maps.shape) == ((1, 8192, 32, 32), (1, 6, 256, 256))
    assert model.from_codes.weight.shape == (128, 8192, 1, 1)
    assert model.encoder.group_3[1].gain == 1 / 64


def test_encoder__equals_the_public_one_of_dalle_with_the_same_weights():
    ours = tiny_dvae(num_blocks_per_group=2).eval()
    theirs = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=16)).eval()
    names = {"encoder.": "blocks.", "identity": "id_path", "to_logits": "blocks.output.conv"}
    names |= {f"residual.{2 * n + 1}": f"res_path.path.conv_{n + 1}" for n in range(4)}
    names |= {
        f"{group}.{n}.": f"{group}.group.block_{n + 1}."
        for group in map("group_{}".format, range(1, 5))
        for n in (0, 1)
    }
    state = {}
    for name, value in ours.state_dict().items():
        if name.startswith(("encoder.", "to_logits.")):
            for old, new in names.items():
                name = name.replace(old, new)
            state[name] = value
    theirs.load_state_dict(state, strict=True)
    pixels = map_pixels(photographs())
    assert torch.allclose(ours.encode(pixels), theirs(pixels), atol=1e-5)
    assert torch.equal(ours.get_codebook_indices(photographs()), theirs.get_codebook_indices(pixels))


@pytest.mark.parametrize("kernel_sizes", [(3, 3, 3, 1), (1, 3, 3, 3)])
def test_block__adds_the_residual_times_the_gain(kernel_sizes):
    block = DvaeBlock(8, 8, kernel_sizes, gain=1 / 64)
    x = torch.randn(1, 8, 6, 6)
    assert torch.allclose(block(x) - x, block.residual(x) / 64, atol=1e-6)
    assert [layer.kernel_size[0] for layer in block.residual if isinstance(layer, nn.Conv2d)] == list(kernel_sizes)


@pytest.mark.parametrize(("num_groups", "stride"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_stride__doubles_with_each_group(num_groups, stride):
    model = tiny_dvae(num_groups=num_groups, image_size=[16, 32]).eval()
    codes = model.get_codebook_indices(torch.zeros(2, 3, 16, 32, dtype=torch.uint8))
    assert codes.shape == (2, 16 // stride, 32 // stride)
    assert model.decode(codes).shape == (2, 3, 16, 32)
    assert model.image_size == (16, 32)


def test_initialization__is_normal_with_the_fan_in():
    model = tiny_dvae(hidden_size=64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 2000:
            assert parameter.std().item() == pytest.approx(parameter[0].numel() ** -0.5, rel=0.1), name


def test_image_size__must_be_a_multiple_of_the_stride():
    with pytest.raises(ValueError, match="36 x 32 is not a multiple of the tokenizer's stride of 8"):
        DvaeConfig(image_size=[36, 32])
    with pytest.raises(ValueError, match="resize them to 32 x 32"):
        tiny_dvae().get_codebook_indices(torch.zeros(1, 3, 30, 30, dtype=torch.uint8))


# ---- the tokenizer's interface ----


def test_codes__are_int64_the_same_at_each_call_and_for_floats():
    model, pixels = tiny_dvae(), photographs()
    codes = model.get_codebook_indices(pixels)
    assert codes.dtype == torch.int64
    assert codes.shape == (8, 4, 4)
    assert torch.equal(codes, model.get_codebook_indices(pixels))
    assert torch.equal(codes, model.get_codebook_indices(pixels / 255))
    assert len(codes.unique()) > 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes, model.get_codebook_indices(pixels))


def test_decode__is_the_image_of_hard_codes_in_0_to_1():
    model = tiny_dvae().eval()
    codes = model.get_codebook_indices(photographs())
    one_hot = nn.functional.one_hot(codes, 16).movedim(-1, 1).float()
    images = model.decode(codes)
    assert torch.allclose(images, model.decode_soft(one_hot), atol=1e-5)
    assert images.min() >= 0
    assert images.max() <= 1


def test_loss__is_the_reconstruction_plus_the_weighted_divergence_of_a_pixel_channel():
    model, pixels = tiny_dvae().eval(), photographs()
    output = model(pixels, kl_weight=6.6)
    assert output.loss.item() == pytest.approx((output.reconstruction_loss + 6.6 / 192 * output.kl).item())
    spread = model(pixels, usage_weight=0.5)
    usage = kl_of_mean_from_uniform(model.encode(map_pixels(pixels)))
    assert (spread.loss - output.reconstruction_loss).item() == pytest.approx(0.5 * usage.item(), rel=1e-4)


def test_training__lowers_the_loss_of_picked_codes():
    model, pixels = tiny_dvae(), photographs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = model.eval()(pixels).loss.item()
    model.train()
    for step in range(60):
        torch.manual_seed(step)
        model(pixels, temperature=Schedule(1.0, 1 / 16, 40).at(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(pixels).loss.item() < before - 0.2


def test_start_from_images__uses_more_codes_than_noise_does():
    pixels = photographs(48)
    used = []
    for starts in (False, True):
        model = tiny_dvae(vocab_size=64, hidden_size=16)
        if starts:
            start_from_images(model, map_pixels(pixels), seeded_generator(0))
        used.append(CodebookUse.of(torch.bincount(model.get_codebook_indices(pixels).flatten(), minlength=64)))
    assert used[1].num_alive > 48
    assert used[1].perplexity > 2 * used[0].perplexity


def test_start_from_images__refuses_fewer_positions_than_codes():
    with pytest.raises(ValueError, match=r"32 positions to initialize 64 codes from: .* lower vocab_size"):
        start_from_images(tiny_dvae(vocab_size=64), map_pixels(photographs(2)), seeded_generator(0))


def test_weight_average__follows_and_gives_the_weights_back():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    average = WeightAverage(model, decay=0.5)
    nn.init.constant_(model.weight, 1.0)
    for num_updates in range(100, 103):
        average.update(num_updates)
    with average.in_place_of_weights():
        assert model.weight.item() == pytest.approx(1 - 0.5**3)
    assert model.weight.item() == 1.0


OPEN = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert not any(name == "modeling" for name in sys.modules)
pixels = torch.load(sys.argv[2])
torch.save(model.get_codebook_indices(pixels), sys.argv[3])
"""


def test_saved__opens_here_and_by_its_own_code_in_a_clean_process(tmp_path):
    model, pixels = tiny_dvae(), photographs()
    codes = model.get_codebook_indices(pixels)
    model.save_pretrained(tmp_path / "tokenizer")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "tokenizer").get_codebook_indices(pixels), codes)
    torch.save(pixels, tmp_path / "pixels.pt")
    command = [sys.executable, "-c", OPEN, *(str(tmp_path / n) for n in ("tokenizer", "pixels.pt", "codes.pt"))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "codes.pt"), codes)
