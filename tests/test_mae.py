"""MAE against the numbers of the authors' own code (tests/golden), and what its page promises."""

from pathlib import Path

import pytest
import torch
from conftest import PATCH, SIZE, tiny_batch, tiny_images, tiny_model
from safetensors.torch import load_file
from torch.testing import assert_close

from data.collators import MaskingCollator
from hub.convert import __main__ as convert
from modeling.mae import MaeConfig, MaeForPreTraining
from modeling.patches import (
    patchify,
    sincos_positions,
    take_tokens,
    unpatchify,
    visible_and_masked_indices,
    visible_and_predicted_indices,
)

GOLDEN = Path(__file__).parent / "golden"
MODELS = {"mae_small_normpix": (2, 4, "true"), "mae_small_rawpix": (4, 4, "false")}
RELATIVE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module", params=sorted(MODELS))
def golden(request, tmp_path_factory):
    """The authors' file through the converter's command line, loaded back from `pretraining/`, and their numbers."""
    out = tmp_path_factory.mktemp("converted")
    encoder_heads, decoder_heads, norm_pix = MODELS[request.param]
    flags = ["--num_attention_heads", encoder_heads, "--decoder_num_attention_heads", decoder_heads]
    arguments = ["--from", "mae", GOLDEN / f"{request.param}.pth", "--to", out, *flags, "--norm_pix_loss", norm_pix]
    convert.main([str(argument) for argument in arguments])
    return MaeForPreTraining.from_pretrained(out / "pretraining"), load_file(GOLDEN / f"{request.param}.safetensors")


def test_golden__loss_predictions_and_gradients_equal_the_authors(golden):
    model, expected = golden
    bool_masked_pos = expected["mask"].bool()
    output = model(expected["pixel_values"], bool_masked_pos)
    output.loss.backward()
    _, hidden = visible_and_masked_indices(bool_masked_pos)
    assert_close(output.loss, expected["loss"].squeeze(), **RELATIVE)
    assert_close(output.logits, take_tokens(expected["pred"], hidden), rtol=1e-4, atol=1e-5)
    gradients = {
        "decoder_pred.weight": model.decoder_pred.weight.grad,
        "mask_token": model.mask_token.grad,
        "patch_embed.proj.weight": model.encoder.embeddings.patch_embeddings.projection.weight.grad,
    }
    for name, gradient in gradients.items():
        assert_close(gradient, expected[f"grad.{name}"], rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


@torch.no_grad()
def test_golden__latents_and_every_prediction_equal_the_authors(golden):
    model, expected = golden
    patches = patchify(expected["pixel_values"], model.config.encoder_config.patch_size)
    order = expected["noise"].argsort(dim=1)  # the authors keep the patches in order of increasing noise
    visible, hidden = order.split([expected["latent"].shape[1] - 1, int(expected["mask"][0].sum())], dim=1)
    latent = model.encoder.encode(take_tokens(patches, visible), visible)[-1]
    assert_close(latent, expected["latent"], rtol=1e-4, atol=1e-5)
    predictions = take_tokens(model.decode(latent, visible, hidden), order.argsort(dim=1))
    assert_close(predictions, expected["pred"], rtol=1e-4, atol=1e-5)


def test_patchify__is_undone_exactly_and_starts_with_the_top_left_color():
    image = torch.arange(2 * 3 * 32 * 48).reshape(2, 3, 32, 48)
    patches = patchify(image, 8)
    assert torch.equal(unpatchify(patches, 8, (4, 6)), image)
    assert torch.equal(patches[:, 0, :3], image[:, :, 0, 0])


def test_positions__column_in_the_first_half_row_in_the_second():
    table = sincos_positions((3, 5), 16)[0]
    assert table.shape == (16, 16)
    assert not table[0].any()
    one_right, one_down = table[1] - table[2], table[1] - table[1 + 5]
    assert one_right[:8].any()
    assert not one_right[8:].any()
    assert one_down[8:].any()
    assert not one_down[:8].any()


def test_counts__of_the_paper():
    mask = torch.zeros(2, 196, dtype=torch.bool)
    mask[:, ::4] = True
    visible, hidden = visible_and_masked_indices(~mask)
    assert (visible.shape[1], hidden.shape[1]) == (49, 147)
    assert torch.equal(visible[0], torch.arange(0, 196, 4))


def test_masks__unequal_counts_are_refused():
    mask = torch.eye(4, dtype=torch.bool)
    mask[0] = True
    with pytest.raises(ValueError, match="same number of masked patches"):
        visible_and_masked_indices(mask)


def test_norm_pix__zero_prediction_of_noise_and_constant_patches():
    config = MaeConfig(encoder_config=tiny_encoder(), decoder_hidden_size=16, decoder_num_attention_heads=2)
    model = MaeForPreTraining(config)
    noise = torch.randn(4, 50, 768, generator=torch.Generator().manual_seed(0))
    assert model.pixel_loss(torch.zeros_like(noise), noise).item() == pytest.approx(767 / 768, abs=1e-5)
    assert model.pixel_loss(torch.zeros(1, 1, 768), torch.full((1, 1, 768), 0.7)).item() == pytest.approx(0, abs=1e-6)


def test_init__is_the_authors():
    model = MaeForPreTraining(MaeConfig(encoder_config={"num_hidden_layers": 2}, decoder_num_hidden_layers=1))
    embeddings, block = model.encoder.embeddings, model.encoder.layers[1]
    assert embeddings.patch_embeddings.projection.weight.abs().max().item() == pytest.approx(0.0625, rel=0.01)
    assert embeddings.patch_embeddings.projection.bias.abs().max().item() <= 1 / 768**0.5
    for linear, fan_in_and_out in {
        block.attention.q_proj: 4 * 768,  # as a third of one fused (3D, D) matrix
        block.attention.k_proj: 4 * 768,
        block.attention.v_proj: 4 * 768,
        block.attention.o_proj: 2 * 768,
        block.mlp.fc1: 5 * 768,
        block.mlp.fc2: 5 * 768,
        model.decoder_layers[0].attention.k_proj: 4 * 512,
        model.decoder_embed: 768 + 512,
        model.decoder_pred: 768 + 512,
    }.items():
        assert linear.weight.abs().max().item() == pytest.approx((6 / fan_in_and_out) ** 0.5, rel=0.01)
        assert not linear.bias.any()
    for token in (embeddings.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(embeddings.position_embeddings, sincos_positions((14, 14), 768))
    assert torch.equal(model.decoder_positions, sincos_positions((14, 14), 512))
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


def test_config__an_image_size_that_the_patch_size_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="225 x 225 is not a multiple of patch size 16"):
        MaeConfig(encoder_config={**tiny_encoder(), "image_size": 225})


def test_config__a_mistyped_setting_names_the_nearest():
    with pytest.raises(ValueError, match="norm_pix_loss"):
        MaeConfig(norm_pix_los=False)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_compile__is_one_graph(decoder):
    sizes = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
    config = MaeConfig(encoder_config=tiny_encoder(), decoder=decoder, **sizes)
    model = MaeForPreTraining(config)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(images, mask, 8).loss, model(images, mask).loss)


# ---- the cross decoder, a part of the masked patches, several masks ----

BOTH = ["mae", "mae+cross"]


def batch_of(num_images: int = 4, **settings) -> dict:
    """Photographs with the same masks whatever the settings are."""
    images = tiny_images()
    collate = MaskingCollator((SIZE // PATCH, SIZE // PATCH), 0.75, **settings)
    return collate([images[index] for index in range(num_images)])


def test_config__an_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match="expected self or cross"):
        MaeConfig(encoder_config=tiny_encoder(), decoder="mixed")


def test_config__files_of_older_versions_have_the_self_decoder(tmp_path):
    tiny_model("mae").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"decoder": "self",', ""))
    assert MaeForPreTraining.from_pretrained(tmp_path).config.decoder == "self"


@torch.no_grad()
def test_cross__predictions_do_not_depend_on_which_others_are_predicted():
    model, batch = tiny_model("mae+cross").eval(), batch_of(prediction_ratio=0.5)
    _, every = visible_and_masked_indices(batch["bool_masked_pos"])
    _, some = visible_and_predicted_indices(batch["bool_masked_pos"], batch["bool_predicted_pos"])
    whole = {name: batch[name] for name in ("pixel_values", "bool_masked_pos")}
    logits = model.predicted_units(model(**whole).logits, batch["bool_masked_pos"])
    assert some.shape[1] == every.shape[1] // 2
    assert_close(take_tokens(logits, some), model(**batch).logits)


@torch.no_grad()
def test_cross__each_block_begins_with_the_encoders_output_and_learns_which_layers_to_read():
    model = tiny_model("mae+cross")
    assert torch.equal(model.decoder_mix, torch.tensor([[0.0, 0.0, 1.0]] * 2))
    batch = batch_of()
    before = model(**batch).logits
    model.decoder_mix[1] = torch.tensor([1.0, 0.0, 0.0])
    assert not torch.allclose(before, model(**batch).logits)


@pytest.mark.parametrize("variant", BOTH)
def test_prediction_ratio__counts_the_predicted_patches_and_averages_their_errors(variant):
    model, batch = tiny_model(variant).eval(), batch_of(prediction_ratio=0.25)
    output = model(**batch)
    assert batch["num_masked_patches"] == 4 * 12
    assert batch["num_predicted_patches"] == int(batch["bool_predicted_pos"].sum()) == 4 * 3
    assert model.loss_counts(batch) == {"loss": 4 * 3}
    assert output.logits.shape == (4, 3, PATCH * PATCH * 3)
    target = patchify(model.standardize(batch["pixel_values"]), PATCH)[batch["bool_predicted_pos"]].view(4, 3, -1)
    assert_close(output.loss, model.pixel_loss(output.logits, target))


@pytest.mark.parametrize("variant", BOTH)
def test_prediction_ratio__masked_patches_that_are_not_predicted_are_not_seen(variant):
    model, batch = tiny_model(variant).eval(), batch_of(prediction_ratio=0.5)
    others = batch["bool_masked_pos"] & ~batch["bool_predicted_pos"]
    pixels = patchify(batch["pixel_values"], PATCH)
    pixels[others] = 255 - pixels[others]
    changed = {**batch, "pixel_values": unpatchify(pixels, PATCH, (SIZE // PATCH, SIZE // PATCH))}
    assert torch.equal(model(**batch).loss, model(**changed).loss)


def test_prediction_ratio__unequal_numbers_are_refused():
    batch = batch_of(prediction_ratio=0.5)
    batch["bool_predicted_pos"][0] = batch["bool_masked_pos"][0]
    del batch["num_predicted_patches"]
    with pytest.raises(ValueError, match="same number of predicted patches"):
        tiny_model("mae")(**batch)


@pytest.mark.parametrize("variant", BOTH)
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_num_masks__equal_as_many_images_with_one_mask_each(variant, ratio):
    several, one = (tiny_model(variant) for _ in range(2))
    batch = batch_of(num_masks=3, prediction_ratio=ratio)
    repeated = {name: value.flatten(0, 1) if name.startswith("bool") else value for name, value in batch.items()}
    repeated["pixel_values"] = batch["pixel_values"].repeat_interleave(3, dim=0)
    outputs = several(**batch), one(**repeated)
    assert batch["bool_masked_pos"].shape == (4, 3, 16)
    assert several.loss_counts(batch)["loss"] == 4 * 3 * round(12 * ratio)
    assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for (name, parameter), other in zip(several.named_parameters(), one.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", BOTH)
def test_checkpointing__recomputes_encoder_and_decoder_blocks_and_gives_every_gradient(variant):
    models, num_calls = [tiny_model(variant).train() for _ in range(2)], []
    (getattr(models[1], "activation_checkpointing_enable", None) or models[1].gradient_checkpointing_enable)()
    for model in models:
        calls = []
        for block in (*model.encoder.layers, *model.decoder_layers):
            block.mlp.fc1.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        model(**tiny_batch(variant)).loss.backward()
        num_calls.append(len(calls))
    assert num_calls[1] == 2 * num_calls[0]
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(parameter.grad, other.grad) if parameter.requires_grad else other.grad is None


@torch.no_grad()
def test_pixels__are_bitwise_those_of_the_standardized_image():
    model, images = tiny_model("mae"), batch_of()["pixel_values"]
    indices = torch.tensor([[3, 0, 15]] * 4)
    expected = take_tokens(patchify(model.standardize(images), PATCH), indices)
    assert torch.equal(model.take_pixels(patchify(images, PATCH), indices), expected)


# ---- images of other sizes than the config's ----


@torch.no_grad()
@pytest.mark.parametrize("variant", BOTH)
def test_other_size__equals_a_model_of_that_size(variant):
    model, other = tiny_model(variant), tiny_model(variant, image_size=2 * SIZE)
    fixed = ("encoder.embeddings.position_embeddings", "decoder_positions")
    other.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name not in fixed}, strict=False
    )
    images = torch.randint(0, 256, (2, 3, 2 * SIZE, 2 * SIZE), dtype=torch.uint8)
    mask = (torch.arange(64) % 4 > 0).expand(2, -1)
    assert torch.equal(model(images, mask).loss, other(images, mask).loss)
    assert all(name in fixed or "_tables" not in name for name in model.state_dict())


@torch.no_grad()
def test_other_size__positions_of_another_model_are_resized():
    model = tiny_model("mae")
    model.encoder.embeddings.position_embeddings.normal_(generator=torch.Generator().manual_seed(0))
    table = model.encoder.positions((8, 8))
    assert torch.equal(table[0], model.encoder.embeddings.position_embeddings[0, 0])
    assert not torch.allclose(table, sincos_positions((8, 8), 32)[0])
    assert table.shape == (65, 32)


def tiny_encoder() -> dict:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {**sizes, "image_size": (32, 48), "patch_size": 16}
