"""BEiT against the numbers of the authors' own code (tests/golden), and what its page promises."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from hub.convert import __main__ as convert
from modeling.beit import BeitForPreTraining, BeitMimConfig

GOLDEN = Path(__file__).parent / "golden"
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ENCODER |= {"image_size": 64, "patch_size": 16}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The authors' file through the converter's command line, loaded back from `pretraining/`, and their numbers."""
    out = tmp_path_factory.mktemp("converted")
    convert.main(["--from", "beit", str(GOLDEN / "beit.pth"), "--to", str(out)])
    return BeitForPreTraining.from_pretrained(out / "pretraining"), load_file(GOLDEN / "beit.safetensors")


def test_golden__loss_logits_and_gradient_equal_the_authors(golden):
    model, expected = golden
    mask = expected["bool_masked_pos"].bool()
    labels = torch.zeros(mask.shape, dtype=torch.int64)
    labels[mask] = expected["labels_masked"].long()
    output = model(expected["pixel_values"], mask, labels)
    output.loss.backward()
    assert_close(output.loss, expected["loss"].squeeze(), rtol=1e-4, atol=1e-6)
    assert_close(output.logits, expected["logits_masked"], rtol=1e-4, atol=1e-5)
    gradient = model.encoder.embeddings.mask_token.grad
    assert_close(gradient, expected["grad.mask_token"], rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@torch.no_grad()
def test_golden__logits_of_every_patch_equal_the_authors(golden):
    model, expected = golden
    features = model.encoder(expected["pixel_values"], bool_masked_pos=expected["bool_masked_pos"].bool())
    logits = model.lm_head(features.last_hidden_state[:, 1:])
    assert_close(logits, expected["logits_all"], rtol=1e-4, atol=1e-5)


def tiny(vocab_size: int = 8192) -> BeitForPreTraining:
    torch.manual_seed(0)
    return BeitForPreTraining(BeitMimConfig(encoder_config=ENCODER, vocab_size=vocab_size))


def batch_of(num_images: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, 3, 64, 64), dtype=torch.uint8, generator=generator)
    mask = torch.rand(num_images, 16, generator=generator) < torch.linspace(0.2, 0.8, num_images)[:, None]
    return pixels, mask, torch.randint(0, vocab_size, (num_images, 16), generator=generator)


def test_loss__starts_at_that_of_a_uniform_guess():
    assert tiny()(*batch_of(8, 8192)).loss.item() == pytest.approx(math.log(8192), abs=0.1)


def test_loss__is_the_mean_over_hidden_patches_and_ignores_the_tokens_of_visible_ones():
    model = tiny(64).eval()
    pixels, mask, labels = batch_of(6, 64)
    output = model(pixels, mask, labels)
    assert output.logits.shape == (int(mask.sum()), 64)
    assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels[mask]))
    accuracy = (output.logits.argmax(-1) == labels[mask]).float().mean().item()
    assert model.summarize_metrics(output.metrics)["accuracy"] == pytest.approx(accuracy)
    assert_close(model(pixels, mask, torch.where(mask, labels, 0)).loss, output.loss)
    assert_close(model(pixels, mask, labels, num_masked_patches=int(mask.sum())).loss, output.loss)


def test_loss__needs_labels_and_something_hidden():
    pixels, mask, labels = batch_of(2, 64)
    with pytest.raises(ValueError, match="image tokenizer"):
        tiny(64)(pixels, mask)
    with pytest.raises(ValueError, match="nothing to predict"):
        tiny(64)(pixels, torch.zeros_like(mask), labels)


def test_init__is_the_authors():
    model = BeitForPreTraining(BeitMimConfig(encoder_config=ENCODER | {"hidden_size": 192, "intermediate_size": 768}))
    embeddings, second = model.encoder.embeddings, model.encoder.layers[1]
    for weight in (
        embeddings.patch_embeddings.projection.weight,
        second.attention.q_proj.weight,
        model.lm_head.weight,
    ):
        assert weight.std().item() == pytest.approx(0.0108, rel=0.03)
        assert weight.abs().max().item() <= 0.02
    for weight in (second.attention.o_proj.weight, second.mlp.fc2.weight):
        assert weight.std().item() == pytest.approx(0.0108 / math.sqrt(2 * 2), rel=0.03)
    assert embeddings.cls_token.any()
    assert embeddings.mask_token.any()
    assert not model.encoder.shared_position_bias.relative_position_bias_table.any()
    assert (second.lambda_1 == 0.1).all()
    assert second.attention.k_proj.bias is None


@pytest.mark.parametrize(("num_blocks", "scale"), [(12, 0.1), (24, 1e-5)])
def test_config__layer_scale_is_the_authors_for_the_depth(num_blocks, scale):
    config = BeitMimConfig(encoder_config=ENCODER | {"num_hidden_layers": num_blocks})
    assert config.encoder_config.layer_scale_init_value == scale


def test_compile__is_one_graph():
    model = tiny(64).eval()
    pixels, mask, labels = batch_of(4, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(pixels, mask, labels, int(mask.sum())).loss, model(pixels, mask, labels).loss)


def test_convert__a_file_without_token_head_is_an_encoder(tmp_path):
    state = torch.load(GOLDEN / "beit.pth", weights_only=True)
    torch.save({"model": {k: v for k, v in state["model"].items() if "lm_head" not in k}}, tmp_path / "x.pth")
    convert.main(["--from", "beit", str(tmp_path / "x.pth"), "--to", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "pretraining").exists()
