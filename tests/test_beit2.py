"""BEiT v2 against a transcription of the published formulas (tests/published_beit2.py), and what its page promises."""

import contextlib
import io

import pytest
import torch
from conftest import tiny_arguments, tiny_batch, tiny_config, tiny_model
from published_beit2 import CODES, PATCH, PIXELS, SIDE, WIDTH, beit2_losses, beit2_weights
from torch.testing import assert_close
from transformers import AutoModel

from data.masks import exact_block_mask
from data.seeds import seeded_generator
from hub.convert import __main__ as convert
from hub.convert.key_names import BEIT, to_native
from modeling.beit import BeitForPreTraining, BeitMimConfig
from modeling.beit2 import Beit2Config, Beit2ForPreTraining
from training.trainer import MimTrainer

EARLY = 1  # of four blocks: the fourth from the end, as 9 of 12
NUM_IMAGES = 4


def published_batch() -> dict[str, torch.Tensor]:
    """Standardized images in float64, so that rounding does not blur the comparison, masks and tokens."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(NUM_IMAGES, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    mask = torch.stack([torch.randperm(SIDE**2, generator=generator) < 6 for _ in range(NUM_IMAGES)])
    labels = torch.randint(0, CODES, (NUM_IMAGES, SIDE**2), generator=generator)
    return {"pixel_values": pixels, "bool_masked_pos": mask, "labels": labels}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A file with the names of the released ones, through the converter's command line."""
    folder = tmp_path_factory.mktemp("converted")
    torch.save({"model": beit2_weights()}, folder / "beit2.pth")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        convert.main(["--from", "beit2", str(folder / "beit2.pth"), "--to", str(folder / "out")])
    return folder / "out", printed.getvalue()


def our_names(state) -> dict[str, torch.Tensor]:
    """The authors' weights under our names."""
    found = {}
    for theirs, ours, tensor in to_native(state, BEIT):
        if theirs.startswith("cls_pt_layers."):
            ours = ours.replace("cls_pt_layers.", "aggregation_blocks.")
        elif not theirs.startswith("lm_head."):
            ours = f"encoder.{ours}"
        found[ours] = tensor
    return found


# ---- the published formulas ----


def test_published__one_step_has_the_same_losses_gradients_and_weights(converted, tmp_path):
    """AdamW by hand: clipped to a norm of 1, weight decay on matrices but not on the class token."""
    batch, rate, decay, eps = published_batch(), 1e-2, 0.05, 1e-3
    state = {name: tensor.double().requires_grad_() for name, tensor in beit2_weights().items()}
    losses = beit2_losses(state, *batch.values(), early=EARLY)
    sum(losses).backward()
    norm = torch.stack([tensor.grad.norm() for tensor in state.values()]).norm()
    assert norm > 1

    model = Beit2ForPreTraining.from_pretrained(converted[0] / "pretraining").double()
    assert model.config.aggregation_layer == EARLY
    output = model(**batch)
    assert_close(torch.stack(list(output.losses.values())).double(), torch.stack(losses), rtol=1e-5, atol=0)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    expected = our_names({name: tensor.grad for name, tensor in state.items()})
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)

    model.zero_grad()
    arguments = tiny_arguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=NUM_IMAGES,
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=decay,
        adam_beta2=0.98,
        adam_epsilon=eps,
        max_grad_norm=1.0,
    )
    items = [{name: tensor[index] for name, tensor in batch.items()} for index in range(NUM_IMAGES)]
    MimTrainer(model=model, args=arguments, train_dataset=items).train()
    with torch.no_grad():  # in the first step both moments are those of this gradient
        for name, tensor in state.items():
            is_decayed = tensor.ndim > 1 and not name.endswith("cls_token")
            gradient = tensor.grad / norm
            tensor.mul_(1 - rate * decay * is_decayed).sub_(rate * gradient / (gradient.abs() + eps))
    for name, tensor in our_names({name: tensor.detach() for name, tensor in state.items()}).items():
        assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-3 * rate, msg=name)


def test_converted__exports_a_native_encoder_without_the_extra_blocks(converted):
    folder, printed = converted
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(encoder).__name__ == "BeitModel"
    assert not {key: value for key, value in info.items() if value}
    assert "verified against the file's weights" in printed
    assert "dropped" not in printed


# ---- what its page promises ----


@torch.no_grad()
def test_without_extra_blocks__it_is_beit():
    model, batch = tiny_model("beit2").eval(), tiny_batch("beit2")
    beit = BeitForPreTraining(BeitMimConfig(encoder_config=model.config.encoder_config, vocab_size=16)).eval()
    beit.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("aggregation_blocks.")})
    output, expected = model(**batch), beit(**batch)
    assert_close(output.losses["patch"], expected.loss)
    assert_close(output.logits, expected.logits)
    assert_close(output.loss, output.losses["patch"] + output.losses["class_token"])


def test_later_blocks__reach_the_second_prediction_through_the_class_token_only():
    model, batch = tiny_model("beit2"), tiny_batch("beit2")
    with torch.no_grad():
        for block in model.aggregation_blocks:  # nothing is taken over from other tokens
            block.attention.o_proj.weight.zero_()
    model(**batch).losses["class_token"].backward()
    early, late = model.encoder.layers
    assert early.mlp.fc1.weight.grad.any()
    assert late.mlp.fc1.weight.grad is None or not late.mlp.fc1.weight.grad.any()


@pytest.mark.parametrize(("depth", "layer"), [(1, 1), (4, 1), (12, 9), (24, 21)])
def test_aggregation_layer__is_9_of_12_and_21_of_24(depth, layer):
    assert tiny_config("beit2", num_hidden_layers=depth).aggregation_layer == layer


def test_drop_path__of_the_extra_blocks_goes_on_as_in_the_encoder():
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 32}
    config = Beit2Config(encoder_config={**sizes, "image_size": 32, "patch_size": PATCH}, drop_path_rate=0.1)
    with torch.device("meta"):
        model = Beit2ForPreTraining(config)
    rates = [block.drop_path.drop_prob for block in model.aggregation_blocks]
    assert rates == pytest.approx([0.1 * 9 / 11, 0.1 * 10 / 11])
    assert model.encoder.layers[-1].drop_path.drop_prob == pytest.approx(0.1)


def test_initialization__of_the_extra_blocks_is_that_of_pytorch():
    model = tiny_model("beit2", hidden_size=128)
    first, second = model.aggregation_blocks
    bound = 128**-0.5
    for weight, factor in ((first.attention.q_proj.weight, 1), (first.attention.o_proj.weight, 2 * 2)):
        assert weight.abs().max().item() == pytest.approx(bound / factor**0.5, rel=0.01)
    assert second.attention.o_proj.weight.abs().max().item() == pytest.approx(bound / 6**0.5, rel=0.01)
    assert not first.attention.q_proj.bias.any()
    assert not first.attention.v_proj.bias.any()
    assert first.mlp.fc1.bias.any()
    assert model.encoder.layers[0].attention.q_proj.weight.abs().max() <= 0.02


def test_masks__have_exactly_75_of_196_patches():
    counts = {int(exact_block_mask((14, 14), 0.3827, seeded_generator(n)).sum()) for n in range(200)}
    assert counts == {75}


@pytest.mark.parametrize(("name", "value"), [("aggregation_layer", 3), ("num_aggregation_blocks", 0)])
def test_config__refuses_what_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        Beit2Config(encoder_config=tiny_config("beit2").encoder_config, **{name: value})
