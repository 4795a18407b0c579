"""Frozen features of all encoder families, preprocessing by the saved processor, and embeddings in a file."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import PATCH, ROOT, SIZE, TINY_MODELS, model_class, tiny_batch, tiny_model
from PIL import Image

from data.sources import open_source
from evaluation.embedding import write_embeddings
from evaluation.features import BOTH, CLASS_TOKEN, MEAN, collect, thumbnails, untrained
from evaluation.maps import class_attention, feature_maps
from evaluation.preprocessing import batches
from hub.export.native import export
from modeling.feature_panel import ATTENTION, COMPONENTS, principal_colors
from run_evaluation import open_encoder

PHOTOGRAPHS = sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))[:6]
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": PATCH,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": SIZE,
    "patch_size": PATCH // 2,
}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": PATCH}
# class, config, processor, whether there is a class token
FAMILIES = {
    "ViT": ({}, VIT, "ViT", True),
    "ViTMAE": ({"suffix": "ForPreTraining"}, VIT | DECODER, "ViT", True),
    "Beit": ({}, VIT, "Beit", True),
    "Data2VecVision": ({}, VIT, "Beit", True),
    "DeiT": ({}, VIT, "DeiT", True),
    "Swin": ({}, SWIN, "ViT", False),
    "Dinov2": ({}, DINO, "Bit", True),
    "Dinov2WithRegisters": ({}, DINO, "Bit", True),
    "ConvNext": ({}, {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 32]}, "ConvNext", False),
}


def save(folder, family: str) -> None:
    how, settings, processor, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}{how.get('suffix', 'Model')}")(config)
    for name, table in model.named_parameters():
        if name.endswith("position_embeddings") and not table.any():  # a model without positions is refused
            torch.nn.init.normal_(table, std=0.02)
    model.save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    if processor == "ConvNext":
        own = {"size": {"shortest_edge": SIZE}}
    else:
        own = {"size": {"shortest_edge": SIZE + 6}, "do_center_crop": True, "crop_size": crop, "do_convert_rgb": True}
    getattr(transformers, f"{processor}ImageProcessorPil")(**own, image_mean=[0.4] * 3).save_pretrained(folder)


def photographs(preprocess, size: int = 3):
    source = open_source([str(path) for path in [PHOTOGRAPHS[0].parent]])
    return source, list(batches(source, list(range(6)), preprocess, pytest.fail, size))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(family: str):
        if family not in made:
            save(folder := tmp_path_factory.mktemp(family), family)
            made[family] = str(folder)
        return made[family]

    return folder_of


@pytest.mark.parametrize("family", FAMILIES)
def test_open_encoder__returns_class_token_and_patches_of_every_family(family, folders):
    encoder, preprocess = open_encoder(folders(family))
    _, images = photographs(preprocess)
    tokens = encoder(images[0].pixel_values)
    assert (tokens.class_token is not None) == FAMILIES[family][3]
    assert tokens.patches.shape[0] == 3
    if tokens.class_token is not None:
        assert tokens.patches.shape[1:3] == (SIZE // PATCH, SIZE // PATCH)
        hidden = encoder.outputs(images[0].pixel_values).last_hidden_state
        assert torch.equal(tokens.class_token, hidden[:, 0])
        assert torch.equal(tokens.patches.flatten(1, 2), hidden[:, -16:])
    positions, features, pictures = collect({"one": encoder}, images, preprocess, patches_of="one")
    assert positions == list(range(6))
    kinds = features["one"].by_kind
    assert set(kinds) == ({CLASS_TOKEN, MEAN, BOTH} if FAMILIES[family][3] else {MEAN})
    torch.testing.assert_close(kinds[MEAN], features["one"].patches.float().mean(1), atol=2e-3, rtol=2e-3)
    assert pictures.shape == (6, 3, SIZE, SIZE)
    assert 0 <= pictures.min() < 0.2 < 0.8 < pictures.max() <= 1


def test_open_encoder__a_stock_vit_mae_masks_nothing_and_is_deterministic(folders):
    encoder, preprocess = open_encoder(folders("ViTMAE"))
    assert type(encoder.model) is transformers.ViTModel
    batch = photographs(preprocess)[1][0].pixel_values
    assert torch.equal(encoder(batch).patches, encoder(batch).patches)
    stock = transformers.ViTMAEForPreTraining.from_pretrained(folders("ViTMAE")).eval()
    stock.config.mask_ratio = 0.0
    noise = torch.arange(16.0).expand(3, -1)
    with torch.no_grad():
        expected = stock.vit(batch, noise=noise).last_hidden_state
    torch.testing.assert_close(encoder(batch).patches.flatten(1, 2), expected[:, 1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["ViT", "Beit", "Dinov2", "ConvNext"])
def test_preprocessor__returns_the_pixels_of_the_saved_processor(family, folders):
    _, preprocess = open_encoder(folders(family))
    processor = getattr(transformers, f"{FAMILIES[family][2]}ImageProcessorPil").from_pretrained(folders(family))
    for path in PHOTOGRAPHS[:3]:
        expected = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        assert torch.equal(preprocess([path]), expected)
        assert torch.equal(preprocess([path.read_bytes()]), expected)


@pytest.mark.parametrize(("variant", "channels"), [("mae", 3), ("mae", 1), ("simmim", 3), ("simmim+swin", 3)])
def test_open_encoder__exported_encoders_and_pretraining_models_have_the_same_features(variant, channels, tmp_path):
    head = tiny_model(variant) if channels == 3 else gray_head()
    export(head, tmp_path, method=variant.split("+")[0], recipe={})
    encoder, preprocess = open_encoder(str(tmp_path))
    whole, whole_preprocess = open_encoder(str(tmp_path / "pretraining"))
    batch, whole_batch = preprocess(PHOTOGRAPHS[:2]), whole_preprocess(PHOTOGRAPHS[:2])
    assert batch.shape == (2, 3, SIZE, SIZE)
    assert whole_batch.shape == (2, channels, SIZE, SIZE)
    rounding = 0.0
    if channels == 1:  # the exported encoder sees colors in gray by itself, Pillow rounds to 8 bits
        rounding = 0.01
        gray = (batch * batch.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        torch.testing.assert_close(gray, whole_batch, atol=1.5 / 255 / 0.2, rtol=0)
    else:
        assert torch.equal(batch, whole_batch)
    torch.testing.assert_close(encoder(batch).mean, whole(whole_batch).mean, atol=1e-5 + rounding, rtol=1e-4)


def gray_head():
    settings = TINY_MODELS["mae"]
    encoder = {**settings["encoder_config"], "num_channels": 1}
    config_class = model_class("mae").config_class
    return model_class("mae")(
        config_class(**{**settings, "encoder_config": encoder}, image_mean=[0.5], image_std=[0.2])
    )


def test_open_encoder__names_the_problem(tmp_path, folders):
    with pytest.raises(ValueError, match=r"is not a saved model: it has no config\.json"):
        open_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="is neither a folder nor a Hub id"):
        open_encoder(str(tmp_path / "nowhere"))
    transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        open_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="cannot be opened"):
        open_encoder(str(tmp_path))


def test_open_encoder__refuses_missing_weights(tmp_path, folders):
    model = transformers.ViTModel(transformers.ViTConfig(**VIT))
    state = {name: value for name, value in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    transformers.ViTImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 16 weights of its ViTModel: layers\.1\."):
        open_encoder(str(tmp_path))


def test_encoder__does_not_change_training_modes_or_random_states(folders):
    encoder, preprocess = open_encoder(folders("Beit"))
    encoder.model.train()
    frozen = encoder.model.encoder if hasattr(encoder.model, "encoder") else next(encoder.model.children())
    frozen.eval()
    before = {name: module.training for name, module in encoder.model.named_modules()}
    state, batch = torch.get_rng_state(), photographs(preprocess)[1][0].pixel_values
    assert torch.equal(encoder(batch).mean, encoder(batch).mean)  # drop path would differ
    assert {name: module.training for name, module in encoder.model.named_modules()} == before
    fresh, again = untrained(encoder, seed=1), untrained(encoder, seed=1)
    assert torch.equal(fresh(batch).mean, again(batch).mean)
    assert not torch.allclose(fresh(batch).mean, encoder(batch).mean, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches__skip_unreadable_images_and_keep_the_order(tmp_path, folders):
    _, preprocess = open_encoder(folders("ViT"))
    for number, path in enumerate(PHOTOGRAPHS):
        data = path.read_bytes()
        (tmp_path / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number in (1, 4) else data)
    source, bad = open_source(str(tmp_path)), []
    found = list(batches(source, range(6), preprocess, lambda name, reason: bad.append(name), batch_size=2))
    assert [position for batch in found for position in batch.positions] == [0, 2, 3, 5]
    assert [name[-5:] for name in bad] == ["1.jpg", "4.jpg"]
    assert torch.equal(found[-1].pixel_values, preprocess([PHOTOGRAPHS[5]]))


def test_thumbnails__average_the_pixels():
    batch = torch.arange(2 * 3 * 64 * 32, dtype=torch.float32).view(2, 3, 64, 32)
    assert thumbnails(batch).shape == (2, 3, 32, 16)
    assert torch.equal(thumbnails(batch)[:, :, 0, 0], batch[:, :, :2, :2].mean((2, 3)))
    assert torch.equal(thumbnails(batch[:, :, :20, :20]), batch[:, :, :20, :20])


# ---- embeddings ----


@pytest.mark.parametrize("with_patches", [False, True])
def test_write_embeddings__writes_one_row_per_readable_image(with_patches, tmp_path, folders):
    encoder, preprocess = open_encoder(folders("ViT"))
    source, images = photographs(preprocess, size=4)
    file = tmp_path / "features.parquet"
    assert write_embeddings(file, encoder, iter(images), source, with_patches) == 6
    table = pq.read_table(file)
    assert table["name"].to_pylist() == [source.name(number) for number in range(6)]
    assert table.column_names == ["name", "class_token", "mean", *(["patches"] if with_patches else [])]
    assert pq.ParquetFile(file).num_row_groups == 2  # written batch by batch
    tokens = encoder(torch.cat([batch.pixel_values for batch in images]))
    np.testing.assert_allclose(np.stack(table["mean"].to_numpy()), tokens.mean, atol=1e-5)
    np.testing.assert_allclose(np.stack(table["class_token"].to_numpy()), tokens.class_token, atol=1e-5)
    if with_patches:
        assert table.schema.metadata[b"patches"] == b"4 x 4"
        np.testing.assert_allclose(np.stack(table["patches"].to_numpy()), tokens.patches.flatten(1), atol=1e-5)


def test_write_embeddings__keeps_the_old_file_on_failure(tmp_path, folders):
    encoder, preprocess = open_encoder(folders("ViT"))
    source, images = photographs(preprocess)
    file = tmp_path / "features.parquet"
    file.write_text("old")

    def failing():
        yield images[0]
        raise RuntimeError("the disk")

    with pytest.raises(RuntimeError, match="the disk"):
        write_embeddings(file, encoder, failing(), source, False)
    with pytest.raises(ValueError, match="no image of"):
        write_embeddings(file, encoder, iter(()), source, False)
    assert file.read_text() == "old"


# ---- feature maps ----


@pytest.mark.parametrize("family", ["ViT", "Beit", "Data2VecVision", "Dinov2WithRegisters", "Swin", "ConvNext"])
def test_feature_maps__include_attention_if_there_is_a_class_token(family, folders):
    encoder, preprocess = open_encoder(folders(family))
    batch = photographs(preprocess)[1][0].pixel_values
    before = encoder.outputs(batch).last_hidden_state
    kinds = [type(module) for module in encoder.model.modules()]
    attention = class_attention(encoder, batch)
    assert (attention is not None) == FAMILIES[family][3]
    assert [type(module) for module in encoder.model.modules()] == kinds
    assert torch.equal(encoder.outputs(batch).last_hidden_state, before)
    if attention is not None:
        assert attention.shape == (3, 4, 4)
        torch.testing.assert_close(attention.amax((1, 2)), torch.ones(3))
    picture, text = feature_maps(encoder, preprocess, batch)
    assert ("attention" in text) == (attention is not None)
    assert picture.width > 300
    assert encoder.config._attn_implementation != "eager" or family == "ConvNext"


def test_principal_colors__separate_two_kinds_of_patches():
    patches = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    patches[:, :, 2:, 3] += 5
    colors = principal_colors(patches)
    assert colors.shape == (2, 3, 4, 4)
    assert (colors[:, 0, :, 2:] > 0.8).all()
    assert (colors[:, 0, :, :2] < 0.2).all()


@pytest.mark.parametrize(
    ("variant", "columns"),
    [
        ("ibot", ["input", f"teacher: {ATTENTION}", f"teacher: {COMPONENTS}"]),
        ("dinov2", ["input", f"teacher: {ATTENTION}", f"teacher: {COMPONENTS}"]),
        ("data2vec", ["input", f"teacher: {COMPONENTS}", f"student: {COMPONENTS}"]),
        ("data2vec2", ["input", f"teacher: {COMPONENTS}", f"student: {COMPONENTS}"]),
    ],
)
def test_panel_of_a_teacher__shows_what_it_represents_of_the_first_crop(variant, columns):
    model, batch = tiny_model(variant).eval(), tiny_batch(variant)
    before = model.teacher.config._attn_implementation
    views = model.panel(batch)
    assert model.panel_problem() is None
    assert list(views) == columns
    pixels = batch["pixel_values"]
    torch.testing.assert_close(views["input"], (pixels[:, 0] if pixels.ndim == 5 else pixels) / 255)
    assert {view.shape[2:] for view in views.values()} == {(SIZE, SIZE)}
    assert model.teacher.config._attn_implementation == before
    if "student" in columns[-1]:  # the same weights, so far
        torch.testing.assert_close(views[columns[1]], views[columns[2]])
    with torch.no_grad():
        model.teacher.layernorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.panel(batch)
