"""The battery that every head in `modeling` passes. Heads are found, not listed."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    OLDEST,
    PATCH,
    ROOT,
    SIZE,
    TINY_MODELS,
    VARIANTS,
    model_class,
    tiny_arguments,
    tiny_batch,
    tiny_collator,
    tiny_images,
    tiny_model,
    tiny_targets,
    train_whole_and_resumed,
)
from forked import run_forked
from mixed import NAME as MIXED
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, Trainer, pipeline

from evaluation.pictures import panel_drawer
from hub.export.native import export
from modeling import MODELS
from training.trainer import MimTrainer


def predicting_model(variant):
    model = tiny_model(variant).eval()
    if not model.predicts_patches:
        assert model(**tiny_batch(variant)).logits is None
        pytest.skip("nothing is masked")
    return model


def test_heads__each_has_a_tiny_configuration_here():
    assert {variant.split("+")[0] for variant in TINY_MODELS} == set(MODELS)


def test_loss__is_finite_and_reaches_every_trainable_parameter(variant):
    head = tiny_model(variant)
    loss = head(**tiny_batch(variant)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32
    without = [n for n, p in head.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A key bias shifts all scores of a query alike, so softmax cancels it: its gradient is zero but for rounding.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


@torch.no_grad()
def test_output__is_the_same_for_the_same_input(variant):
    head, batch = tiny_model(variant).eval(), tiny_batch(variant)
    first, second = head(**batch), head(**batch)
    assert torch.equal(first.loss, second.loss)
    assert first.logits is second.logits is None or torch.equal(first.logits, second.logits)


@torch.no_grad()
def test_predictions__differ_between_hidden_patches(variant):
    """With weights moved off their start: BEiT learns positions from zero, so at the start nothing differs."""
    head, batch = predicting_model(variant), tiny_batch(variant)
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    counts = head.masked_units(batch["bool_masked_pos"]).flatten(0, -2).sum(dim=1).tolist()  # of each image or crop
    parts = [part for part in head(**batch).logits.flatten(0, -2).split(counts) if len(part) > 1]  # (M, K)
    assert len(parts) >= 4
    for predictions in parts:
        assert (predictions[:1] - predictions[1:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_predictions__do_not_see_hidden_pixels(variant):
    head, batch = predicting_model(variant), tiny_batch(variant)
    hidden = head.masked_units(batch["bool_masked_pos"]).unflatten(-1, (1, SIZE // PATCH, SIZE // PATCH))
    hidden = hidden.repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
    changed = batch | {"pixel_values": torch.where(hidden, 255 - batch["pixel_values"], batch["pixel_values"])}
    assert not torch.equal(batch["pixel_values"], changed["pixel_values"])
    assert_close(head(**batch).logits, head(**changed).logits)


@torch.no_grad()
def test_predictions__belong_to_mask_units(variant):
    model, batch = predicting_model(variant), tiny_batch(variant)
    logits, units = model(**batch).logits, model.masked_units(batch["bool_masked_pos"])
    predicted = model.predicted_units(logits, units)
    assert (SIZE // model.config.prediction_side) ** 2 == units.shape[-1]
    assert torch.equal(predicted[units], logits.flatten(0, -2))
    assert not predicted[~units].any()


@torch.no_grad()
def test_panel__is_drawn_or_says_why_not(variant):
    model, batch, targets = tiny_model(variant).eval(), tiny_batch(variant), tiny_targets(variant)
    if problem := model.panel_problem(targets):
        assert len(problem) > 10
        return
    if targets is not None:
        batch[targets.view.name] = batch["pixel_values"]
    panel = panel_drawer("tiny", lambda model, batch: model.panel(batch, targets))(model, batch, 7, 0.5)
    assert panel.width > 200
    assert len(panel.getcolors(maxcolors=2**24)) > 100


def test_frozen__stays_frozen_after_a_reload_and_keeps_its_values(variant, tmp_path):
    head = tiny_model(variant)
    head.save_pretrained(tmp_path)
    again = model_class(variant).from_pretrained(tmp_path)
    frozen = {n for n, p in again.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in head.named_parameters() if n.startswith(head.frozen_parameters or ("none",))}
    for (name, before), (_, after) in zip(head.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(before, after), name


def test_uint8__equals_the_standardized_floats(variant):
    head, batch = tiny_model(variant).eval(), tiny_batch(variant)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (head.config.image_mean, head.config.image_std))
    floats = batch | {"pixel_values": (batch["pixel_values"] / 255 - mean) / std}
    assert_close(head(**batch).loss, head(**floats).loss)


def test_images__may_be_rectangular_and_of_any_channel_count(variant):
    if OLDEST and "dinov3" in variant:
        pytest.skip("5.17 has DINOv3 for square images only")
    settings = TINY_MODELS[variant] | {"image_mean": [0.5], "image_std": [0.25]}
    settings["encoder_config"] = settings["encoder_config"] | {"image_size": (32, 48), "num_channels": 1}
    head = model_class(variant)(model_class(variant).config_class(**settings))
    batch = tiny_batch(variant)
    batch |= {name: batch[name][..., :1, :, :] for name in batch if name.endswith("pixel_values")}
    batch["pixel_values"] = torch.cat(2 * [batch["pixel_values"]], dim=-1)[..., :48]
    cells = torch.tensor([[False] + 4 * [True] + [False]]).repeat(4, 1)  # (h, w) of PATCH x PATCH pixels
    step = PATCH // settings["encoder_config"]["patch_size"]
    mask = cells.repeat_interleave(step, 0).repeat_interleave(step, 1).flatten()
    mask = mask.expand(*batch["bool_masked_pos"].shape[:-1], -1)
    batch |= {"bool_masked_pos": mask, "num_masked_patches": int(mask.sum())}
    if "labels" in batch:
        batch["labels"] = torch.ones(mask.shape, dtype=torch.int64)
    if "mask_noise" in batch:
        batch["mask_noise"] = torch.rand(mask.shape)
    assert torch.isfinite(head(**batch).loss)


def test_checkpointing__gives_the_same_gradient(variant):
    gradients = []
    for enable in (False, True):
        head = tiny_model(variant).train()
        if enable:
            # transformers 5.17 has the old name only, later ones warn about it
            (getattr(head, "activation_checkpointing_enable", None) or head.gradient_checkpointing_enable)()
        head(**tiny_batch(variant)).loss.backward()
        gradients.append(
            next(p.grad for n, p in head.named_parameters() if n.endswith(("q_proj.weight", "query.weight")))
        )
    assert_close(*gradients)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention__implementations_agree(variant, implementation):
    head = tiny_model(variant).eval()
    expected = head(**tiny_batch(variant)).loss
    head.set_attn_implementation(implementation)
    assert_close(head(**tiny_batch(variant)).loss, expected)


def test_training__lowers_the_loss_under_ours_and_under_the_stock_trainer(variant, tmp_path, monkeypatch):
    model = tiny_model(variant)
    if hasattr(model, "teacher_heads"):
        # The better a teacher spreads the images over the prototypes, the higher the loss: here it is another model
        # that stands still.
        monkeypatch.setattr(model_class(variant), "after_step", lambda self, progress: None)
        torch.manual_seed(1)
        model.teacher_heads.load_state_dict(model.build_heads().apply(model._init_weights).state_dict())
    for trainer_class in (Trainer, MimTrainer):
        trainer = trainer_class(
            model=copy.deepcopy(model),
            args=tiny_arguments(tmp_path, max_steps=30, learning_rate=3e-3),
            train_dataset=tiny_images(variant=variant),
            eval_dataset=tiny_images(train=False, variant=variant),
            data_collator=tiny_collator(variant, with_image_index=trainer_class is MimTrainer),
        )
        before = trainer.evaluate()["eval_loss"]
        assert trainer.evaluate()["eval_loss"] == before  # fixed masks
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before


def test_accumulation__of_4_batches_of_2_equals_one_of_8(variant, tmp_path):
    if tiny_model(variant).compares_images:
        pytest.skip("the loss of a batch is not the mean of those of its parts")
    weights = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = MimTrainer(
            model=tiny_model(variant),
            args=tiny_arguments(
                tmp_path,
                max_steps=3,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",  # Adam divides by the gradient's size and would hide a wrong factor
                learning_rate=0.1,
            ),
            train_dataset=tiny_images(variant=variant),
            data_collator=tiny_collator(variant, with_image_index=True),
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, expected in weights[0].items():
        assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_resume__gives_the_undisturbed_weights_bit_by_bit(variant, tmp_path):
    dropped = {"hidden_dropout_prob": 0.1}
    if "drop_path_rate" in TINY_MODELS[variant]["encoder_config"]:
        dropped["drop_path_rate"] = 0.3

    def make_trainer(folder, callbacks):
        return MimTrainer(
            model=tiny_model(variant, **dropped),
            args=tiny_arguments(
                folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=4,
            ),
            train_dataset=tiny_images(variant=variant),
            data_collator=tiny_collator(variant, with_image_index=True),
            callbacks=callbacks,
        )

    whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name


LOAD_ALL = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
import transformers
from transformers import AutoModel, AutoModelForPreTraining
# In 5.17 AutoImageProcessor cannot be used without torchvision, whatever the folder holds.
auto_class = "ViTImageProcessorPil" if transformers.__version__.startswith("5.17.") else "AutoImageProcessor"
AutoImageProcessor = getattr(transformers, auto_class)
assert not any(name in sys.modules for name in ("modeling", "hub", "training"))
results = {}
for variant in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{variant}"
    batch = torch.load(f"{folder}.batch", weights_only=True)
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    pixels = batch.pop("standardized")
    first, second = encoder(pixels), encoder(pixels)
    head = AutoModelForPreTraining.from_pretrained(folder + "/pretraining", trust_remote_code=True)
    by_subfolder = AutoModelForPreTraining.from_pretrained(folder, subfolder="pretraining", trust_remote_code=True)
    results[variant] = {
        "class": type(encoder).__module__,
        "leftovers": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "repeatable": torch.equal(first.last_hidden_state, second.last_hidden_state),
        "features": first.last_hidden_state.flatten().tolist(),
        "loss": head(**batch).loss.item(),
        "loss_by_subfolder": by_subfolder(**batch).loss.item(),
        "processor": type(AutoImageProcessor.from_pretrained(folder)).__name__,
    }
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def opened_elsewhere(tmp_path_factory):
    """Every head exported, and opened in one process that cannot import this project."""
    folder = tmp_path_factory.mktemp("exported")
    expected = {}
    for variant in VARIANTS:
        head, batch = tiny_model(variant).eval(), tiny_batch(variant)
        export(head, folder / variant, method=variant, recipe={"mask_ratio": 0.75})
        standardized = head.standardize(batch["pixel_values"]).flatten(0, -4)
        torch.save(batch | {"standardized": standardized}, folder / f"{variant}.batch")
        with torch.no_grad():
            features = head.exported_encoder(standardized).last_hidden_state
        expected[variant] = {"features": features, "loss": head(**batch).loss.item()}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", LOAD_ALL, str(folder), *VARIANTS]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder, expected, json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_root__opens_quietly_with_plain_automodel_in_a_process_without_this_project(opened_elsewhere, variant):
    _, expected, found, stderr = opened_elsewhere
    assert found[variant]["class"].startswith("transformers.models.")
    assert found[variant]["leftovers"] == {}
    assert found[variant]["repeatable"]
    assert_close(torch.tensor(found[variant]["features"]), expected[variant]["features"].flatten(), rtol=0, atol=1e-5)
    assert not [line for line in stderr.splitlines() if "MISSING" in line or "UNEXPECTED" in line or "newly" in line]


def test_pretraining__opens_by_remote_code_and_gives_the_same_loss(opened_elsewhere, variant):
    _, expected, found, _ = opened_elsewhere
    assert found[variant]["loss"] == pytest.approx(expected[variant]["loss"], abs=1e-6)
    assert found[variant]["loss_by_subfolder"] == pytest.approx(expected[variant]["loss"], abs=1e-6)


def test_root__carries_the_recipe_and_no_pointer_to_code(opened_elsewhere, variant):
    config = json.loads((opened_elsewhere[0] / variant / "config.json").read_text())
    assert config["mim_method"] == variant
    assert config["mim_recipe"] == {"mask_ratio": 0.75}
    assert "auto_map" not in config
    assert opened_elsewhere[2][variant]["processor"].startswith("ViTImageProcessor")


@pytest.mark.skipif(OLDEST, reason="5.17 opens no image processor without torchvision")
def test_export__of_a_gray_encoder_takes_any_picture(variant, tmp_path):
    """As the model card promises: the processor and the pipeline convert to RGB."""
    settings = TINY_MODELS[variant] | {"image_mean": [0.4], "image_std": [0.25]}
    settings["encoder_config"] = settings["encoder_config"] | {"num_channels": 1}
    head = model_class(variant)(model_class(variant).config_class(**settings)).eval()
    export(head, tmp_path, method=variant, recipe={})
    pipe = pipeline("image-feature-extraction", model=str(tmp_path))
    color = Image.open(next((ROOT / "data/samples/photographs/train").glob("*.jpg")))
    assert np.shape(pipe(color)) == np.shape(pipe(color.convert("L")))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    gray = color.convert("L").resize((SIZE, SIZE))
    pixel_values = processor(gray.convert("RGB"), return_tensors="pt").pixel_values
    with torch.no_grad():
        standardized = head.standardize(torch.from_numpy(np.array(gray))[None, None])
        ours = head.exported_encoder(standardized).last_hidden_state
        theirs = AutoModel.from_pretrained(tmp_path)(pixel_values).last_hidden_state
    assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_export__leaves_an_old_export_alone_when_the_new_one_is_wrong(variant, tmp_path, monkeypatch):
    export(tiny_model(variant), tmp_path, method=variant, recipe={})
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    opened = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        next(p for n, p in opened.named_parameters() if n.endswith("layernorm.bias") or n == "norm.bias").add_(1)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *args, **kwargs: (opened, {}))
    with pytest.raises(RuntimeError, match="differs from the one in memory"):
        export(tiny_model(variant), tmp_path, method=variant, recipe={})
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_two_processes__equal_one_with_the_same_global_batch(tmp_path):
    """All heads in one launch. DDP averages in another order than one process sums, hence the tolerance."""
    script = Path(__file__).parent / "train_all_heads.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for num_processes, name in ((None, "one"), (2, "two")):
        result = run_forked([script, tmp_path / name], environment, num_processes=num_processes)
        assert result.returncode == 0, result.stderr[-3000:]
    for variant in [*VARIANTS, *([MIXED] if "beit3" in VARIANTS else [])]:
        one, two = (torch.load(tmp_path / name / f"{variant}.pt", weights_only=True) for name in ("one", "two"))
        assert two["world_size"] == 2
        for name, expected in one["weights"].items():
            # A queue holds features, of length 1, in which batch statistics magnify the last digit of weights.
            atol = 1e-4 if name.endswith("queue.features") else 1e-6
            assert_close(two["weights"][name], expected, rtol=1e-4, atol=atol)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
