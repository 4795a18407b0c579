"""VQ-KD against a transcription of the published formulas (tests/published_beit2.py), and the codebook's rules."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_arguments, tiny_images, train_whole_and_resumed
from forked import run_forked
from published_beit2 import CODE_SIZE, CODES, FEATURES, PIXELS, SIDE, moved_codebook, vqkd, vqkd_weights
from test_dvae import tiny_dvae
from torch.nn import functional as F
from torch.testing import assert_close
from train_tokenizers import add_features, tiny_vqkd, vqkd_batches, vqkd_trainer
from transformers import AutoModel

from data.seeds import seeded_generator
from hub.convert import __main__ as convert
from modeling.codebook import EmaCodebook, spherical_kmeans
from modeling.frozen_teacher import match_grid
from modeling.schedules import Progress
from modeling.vqkd import VqkdConfig, VqkdModel
from training.targets import TokenizerTargets

PROGRESS = Progress(0, 10, 10)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, str]:
    """A file with the names of the released ones, through the converter's command line."""
    folder = tmp_path_factory.mktemp("converted")
    torch.save({"model": vqkd_weights()}, folder / "vqkd.pth")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        flags = ["--num_attention_heads", "2"]
        convert.main(["--from", "beit2", str(folder / "vqkd.pth"), "--to", str(folder / "out"), *flags])
    return folder / "out", printed.getvalue()


def published_batch(num_images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=generator)
    return pixels, torch.randn(num_images, SIDE**2, FEATURES, generator=generator)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- the published formulas ----


def test_published__codes_features_loss_gradients_and_the_moved_codebook_are_equal(converted):
    (pixels, teacher), state = published_batch(), vqkd_weights()
    leaves = {name: tensor.requires_grad_() for name, tensor in state.items() if name.startswith(("enc", "dec"))}
    expected = vqkd(state, pixels / 255, teacher)
    expected["loss"].backward()
    table, counts = moved_codebook(
        state["quantize.embedding.weight"], state["quantize.cluster_size"], expected["z"], expected["codes"]
    )

    model = AutoModel.from_pretrained(converted[0]).train()
    output = model(pixels, teacher.mT.unflatten(2, (SIDE, SIDE)))
    output.loss.backward()
    assert torch.equal(output.codes.flatten(1), expected["codes"])
    assert len(output.codes.unique()) > 4
    assert_close(output.features, expected["features"], rtol=1e-4, atol=1e-5)
    assert_close(output.loss, expected["loss"])
    for ours, theirs in (
        ("to_code.0.weight", "encode_task_layer.0.weight"),
        ("to_features.2.bias", "decode_task_layer.2.bias"),
        ("encoder.embeddings.position_embeddings", "encoder.pos_embed"),
        ("encoder.layers.0.mlp.fc1.weight", "encoder.blocks.0.mlp.fc1.weight"),
        ("decoder.embeddings.patch_embeddings.projection.weight", "decoder.patch_embed.proj.weight"),
    ):
        gradient = leaves[theirs].grad
        assert_close(
            model.get_parameter(ours).grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=ours
        )
    model.after_step(PROGRESS)
    assert_close(model.codebook.codes, table)
    assert_close(model.codebook.counts, counts)


def test_converted__is_a_tokenizer_without_the_teacher(converted):
    folder, printed = converted
    assert "dropped teacher_model.proj, scaling_layer.scale: the frozen teacher" in printed
    assert "verified against the file's weights" in printed
    targets = TokenizerTargets(AutoModel.from_pretrained(folder), (SIDE, SIDE))
    assert targets.config_settings == {"vocab_size": CODES}
    assert targets.view.interpolation.name == "BICUBIC"  # BEiT v2's, where BEiT has Lanczos
    pixels, _ = published_batch()
    labels = targets({"tokenizer_pixel_values": pixels})["labels"]
    assert torch.equal(labels, vqkd(vqkd_weights(), pixels / 255, torch.ones(3, SIDE**2, FEATURES))["codes"])


def test_defaults__are_the_published_sizes():
    with torch.device("meta"):
        model = VqkdModel(VqkdConfig())
    assert model.codebook.codes.shape == (8192, 32)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (12, 3)
    assert model.encoder.embeddings.position_embeddings.shape == (1, 197, 768)
    assert model.encoder.shared_position_bias is model.encoder.layers[0].relative_position_bias is None
    assert model.encoder.layers[0].lambda_1 == 1.0
    assert (model.config.codebook_decay, model.config.commitment_loss_weight) == (0.99, 1.0)
    assert not model.config.restarts_dead_codes
    assert model.to_features[2].out_features == 512


# ---- the codebook ----


def test_codebook__moves_once_by_all_micro_batches_of_a_step():
    features = unit(40, CODE_SIZE)
    codebooks = [EmaCodebook(CODES, CODE_SIZE, restarts_dead_codes=True) for _ in range(2)]
    for codebook, parts in zip(codebooks, (1, 4), strict=True):
        codebook.codes.copy_(unit(CODES, CODE_SIZE, seed=1))
        for part in features.chunk(parts):
            codebook(part)
        assert torch.equal(codebook.codes, unit(CODES, CODE_SIZE, seed=1))
        codebook.update()
    assert_close(codebooks[0].codes, codebooks[1].codes)
    assert_close(codebooks[0].counts, codebooks[1].counts)
    assert codebooks[0].counts.any()
    assert_close(codebooks[0].codes.norm(dim=1), torch.ones(CODES))


def test_codebook__is_not_moved_by_evaluation():
    codebook = EmaCodebook(CODES, CODE_SIZE).eval()
    codebook.codes.copy_(unit(CODES, CODE_SIZE, seed=1))
    codebook(unit(40, CODE_SIZE))
    codebook.update()
    assert torch.equal(codebook.codes, unit(CODES, CODE_SIZE, seed=1))
    assert not codebook.counts.any()


@pytest.mark.parametrize("restarts", [False, True])
def test_dead_codes__restart_at_the_farthest_features_if_wanted(restarts):
    codebook = EmaCodebook(3, 2, restarts_dead_codes=restarts)
    codebook.codes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))  # nothing is near the last one
    features = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.6, -0.8]]), dim=1)
    codebook(features)
    codebook.update()
    expected = features[2] if restarts else torch.tensor([-1.0, 0.0])
    assert_close(codebook.codes[2], expected)
    assert (codebook.counts[2] > 0) == restarts


def test_kmeans__finds_the_directions_of_groups():
    centers = torch.eye(4, 8)
    features = F.normalize(centers.repeat_interleave(50, 0) + 0.05 * unit(200, 8), dim=1)
    found, counts = spherical_kmeans(features, 4, seeded_generator(3))
    order = found[:, :4].argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert_close(found, centers[order], atol=0.02, rtol=0)
    assert counts.tolist() == [50.0] * 4


def test_start_from_images__uses_more_codes_than_random_ones_and_refuses_fewer_patches_than_codes():
    images = tiny_images()
    pixels = torch.stack([images[index]["pixel_values"] for index in range(16)])
    used = []
    for starts in (False, True):
        model = tiny_vqkd().eval()
        if starts:
            model.start_from_images([add_features({"pixel_values": pixels})], seeded_generator(0))
        used.append(len(model.get_codebook_indices(pixels).unique()))
    assert used[1] > 2 * used[0]
    assert model.num_images_to_start_from == 16
    with pytest.raises(ValueError, match=r"only 48 patches to start 64 codes from: .* lower vocab_size"):
        model.start_from_images([add_features({"pixel_values": pixels[:3]})], seeded_generator(0))


def test_start_from_images__rebuilds_the_mean_of_the_teacher_at_first():
    batches = vqkd_batches()
    features = match_grid(batches[0]["teacher_features"], (4, 4))
    mean = F.normalize(features, dim=-1).flatten(0, 1).mean(0)
    constant = (1 - F.cosine_similarity(features, mean, dim=-1)).mean()
    losses = []
    for starts in (False, True):
        model = tiny_vqkd().eval()
        if starts:
            model.start_from_images(batches, seeded_generator(0))
        losses.append(model(**batches[0]).feature_loss.item())
    assert losses[1] == pytest.approx(constant.item(), abs=0.03)
    assert losses[0] > losses[1] + 0.1


def test_collapse_signs__say_how_few_codes_occur_and_what_to_do():
    logs = {"perplexity": 3.1, "num_alive": 4, "num_tokens": 12800, "loss": 0.6}
    for model, remedy in ((tiny_vqkd(), "restarts_dead_codes"), (tiny_dvae(vocab_size=64), "usage_weight")):
        sign = model.collapse_signs(logs)
        assert sign.startswith("the perplexity of the codes is only 3.1 (4 of 64 occur in 12,800 tokens)")
        assert remedy in sign
        assert model.collapse_signs(logs | {"perplexity": 3.2}) is None  # 5% of 64
        assert model.collapse_signs({"loss": 0.6}) is None


# ---- the tokenizer's interface ----


def test_codes__are_int64_the_same_for_floats_and_under_autocast():
    model, pixels = tiny_vqkd(), vqkd_batches()[0]["pixel_values"]
    codes = model.get_codebook_indices(pixels)
    assert (codes.dtype, tuple(codes.shape[1:])) == (torch.int64, (4, 4))
    assert torch.equal(codes, model.get_codebook_indices(pixels / 255))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes, model.get_codebook_indices(pixels))
    colors = model.decode(codes)
    assert colors.shape == (len(pixels), 3, 32, 32)
    assert 0 <= colors.min() < colors.max() <= 1
    with pytest.raises(ValueError, match=r"images of 16 x 16 pixels .* resize them to 32 x 32"):
        model.get_codebook_indices(pixels[..., :16, :16])


def test_images__may_be_rectangular_and_gray():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = {**sizes, "image_size": [16, 32], "patch_size": 8, "num_channels": 1}
    model = VqkdModel(VqkdConfig(encoder_config=encoder, vocab_size=8, feature_size=4, code_size=4)).train()
    pixels = torch.randint(0, 256, (2, 1, 16, 32), dtype=torch.uint8)
    model(pixels, torch.randn(2, 4, 2, 4)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.get_codebook_indices(pixels).shape == (2, 2, 4)


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 1), ("codebook_decay", 1.0), ("code_size", 0)])
def test_config__refuses_what_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        VqkdConfig(**{name: value})


def test_grid_of_the_teacher__is_interpolated_to_that_of_the_codes():
    model, batch = tiny_vqkd().eval(), vqkd_batches()[0]
    features = batch["teacher_features"]
    finer = features.repeat_interleave(2, 2).repeat_interleave(2, 3)  # (B, F, 8, 8)
    means = F.interpolate(finer, (4, 4), mode="bilinear", antialias=True)
    assert_close(model(batch["pixel_values"], finer).loss, model(batch["pixel_values"], means).loss)
    assert model(batch["pixel_values"], features[:, :, ::2, ::2]).loss.isfinite()


def test_panel__shows_teacher_and_rebuilt_features_and_codes():
    views = tiny_vqkd().eval().panel(vqkd_batches()[0])
    assert len(views) == 4
    assert {tuple(view.shape[1:]) for view in views.values()} == {(3, 32, 32)}
    assert all(len(view.flatten().unique()) > 8 for view in views.values())


# ---- training ----


def test_training__lowers_the_loss_and_counts_codes(tmp_path):
    trainer = vqkd_trainer(tiny_arguments(tmp_path, max_steps=30, learning_rate=3e-3))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before - 0.1
    assert 1 < after["eval_perplexity"] <= after["eval_num_alive"] <= 64
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["num_tokens"] == 8 * 16
    assert {"feature_loss", "commitment_loss", "num_alive", "perplexity"} <= logged[-1].keys()


def test_accumulation__of_4_batches_of_2_equals_one_of_8(tmp_path):
    states = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        arguments = tiny_arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer = vqkd_trainer(arguments, restarts_dead_codes=True)
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, expected in states[0].items():
        assert_close(states[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_resume__gives_the_undisturbed_weights_codes_and_counts_bit_by_bit(tmp_path):
    def make_trainer(folder, callbacks):
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        arguments = tiny_arguments(folder, save_strategy="steps", save_steps=4, **settings)
        return vqkd_trainer(arguments, callbacks, restarts_dead_codes=True)

    whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    state = whole.model.state_dict()
    assert {"codebook.codes", "codebook.counts"} <= state.keys()
    for name, expected in state.items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name


def test_two_processes__equal_one_with_the_same_global_batch(tmp_path):
    script = Path(__file__).parent / "train_tokenizers.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for num_processes, name in ((None, "one"), (2, "two")):
        result = run_forked([script, tmp_path / name], environment, num_processes=num_processes)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert not torch.equal(one["weights"]["codebook.counts"], torch.zeros(64))
    for name, expected in one["weights"].items():
        assert_close(two["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=name)
