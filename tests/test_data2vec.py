"""data2vec against the numbers of the authors' own code (tests/golden), and what its teacher promises."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_arguments, tiny_batch, tiny_collator, tiny_images, tiny_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

from hub.convert import __main__ as convert
from modeling.data2vec import Data2VecConfig, Data2VecForPreTraining
from modeling.ema import EmaTeacher, momentum_schedule, update_ema_
from modeling.schedules import Progress
from training.trainer import MimTrainer

GOLDEN = Path(__file__).parent / "golden"
# The numbers are for a mean of the last two of three blocks that is not normalized again.
LAST_TWO = {"num_target_layers": 2, "post_target_layer_norm": False}


@pytest.fixture(scope="module", params=["student", "teacher"])
def converted(request, tmp_path_factory) -> tuple[str, Path]:
    """The authors' file through the converter's command line, with that encoder at the root."""
    out = tmp_path_factory.mktemp("converted")
    convert.main(["--from", "data2vec", str(GOLDEN / "data2vec.pth"), "--to", str(out), "--weights", request.param])
    return request.param, out


@torch.no_grad()
def test_golden__targets_predictions_and_loss_equal_the_authors(converted):
    expected = load_file(GOLDEN / "data2vec.safetensors")
    assert expected["layer_ids"].tolist() == [1, 2]
    model = Data2VecForPreTraining.from_pretrained(converted[1] / "pretraining", **LAST_TWO)
    mask = expected["bool_masked_pos"]
    targets = model.teacher_targets(expected["pixel_values"], mask.flatten().nonzero().squeeze(1))
    output = model(expected["pixel_values"], mask)
    assert_close(targets, expected["target_masked"], rtol=1e-4, atol=1e-5)
    assert_close(output.logits, expected["prediction_masked"], rtol=1e-4, atol=1e-5)
    assert_close(output.loss, expected["loss"].squeeze(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_converted__root_is_the_chosen_encoder_as_a_native_class(converted):
    weights, out = converted
    root, model = AutoModel.from_pretrained(out), Data2VecForPreTraining.from_pretrained(out / "pretraining")
    assert type(root).__name__ == "Data2VecVisionModel"
    pixels = load_file(GOLDEN / "data2vec.safetensors")["pixel_values"]
    features = root(pixels).last_hidden_state
    student, teacher = (encoder(pixels).last_hidden_state for encoder in (model.encoder, model.teacher))
    assert not torch.allclose(student, teacher, atol=1e-2)
    assert_close(features, {"student": student, "teacher": teacher}[weights], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_targets__are_normalized_and_do_not_depend_on_the_mask():
    model, batch = tiny_model("data2vec").eval(), tiny_batch("data2vec")
    pixels = model.standardize(batch["pixel_values"])
    every = model.teacher_targets(pixels, torch.arange(8 * 16))
    assert_close(every.mean(1), torch.zeros(128), rtol=0, atol=1e-5)
    assert_close(every.var(1, correction=0), torch.ones(128), rtol=0, atol=1e-3)
    masked = batch["bool_masked_pos"].flatten().nonzero().squeeze(1)
    assert_close(model.teacher_targets(pixels, masked), every[masked])


def test_loss__is_smooth_l1_with_the_published_beta():
    model, batch = tiny_model("data2vec").eval(), tiny_batch("data2vec")
    model.teacher_targets = lambda pixels, masked: model.lm_head.bias + torch.full((len(masked), 32), 2.0)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert model(**batch).loss.item() == pytest.approx(1.0)


def test_teacher__starts_as_a_copy_and_is_never_in_training_mode():
    model = tiny_model("data2vec").train()
    assert model.encoder.training
    assert not any(module.training for module in model.teacher.modules())
    for (name, student), teacher in zip(model.encoder.named_parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(student, teacher), name
        assert student.data_ptr() != teacher.data_ptr()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_teacher__is_computed_and_averaged_in_float32(dtype, tmp_path):
    """Under autocast, and also if the model is loaded in half precision."""
    model = tiny_model("data2vec")
    batch = tiny_batch("data2vec")
    masked = batch["bool_masked_pos"].flatten().nonzero().squeeze(1)
    pixels = model.standardize(batch["pixel_values"])
    expected = model.teacher_targets(pixels, masked)
    if dtype is not None:
        model.save_pretrained(tmp_path)
        model = Data2VecForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.teacher_targets(pixels, masked)
        assert torch.isfinite(model(**batch).loss)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with torch.no_grad():
        model.encoder.layernorm.weight.fill_(2.0)
    model.after_step(Progress(0, 10, 10, {"teacher_momentum": 0.9998}))
    assert_close(model.teacher.layernorm.weight, torch.full((32,), 1.0002))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_teacher__follows_once_per_optimizer_step(accumulation, tmp_path, monkeypatch):
    momenta = []
    after_step = EmaTeacher.after_step

    def counted(model, progress):
        momenta.append(progress.values["teacher_momentum"])
        before = model.teacher.layernorm.bias.clone()
        after_step(model, progress)
        expected = before.lerp(model.encoder.layernorm.bias, 1 - momenta[-1])
        assert_close(model.teacher.layernorm.bias, expected)
        assert not torch.equal(before, expected)

    monkeypatch.setattr(EmaTeacher, "after_step", counted)
    model = tiny_model("data2vec")
    model.config.teacher_momentum, model.config.teacher_momentum_start = 0.9, 0.5
    trainer = MimTrainer(
        model=model,
        args=tiny_arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=tiny_images(variant="data2vec"),
        data_collator=tiny_collator("data2vec", with_image_index=True),
    )
    trainer.train()
    assert momenta == pytest.approx([0.5, 0.6, 0.8])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["teacher_momentum"] for entry in logs] == pytest.approx(momenta)
    assert all(0.1 < entry["target_std"] <= 1 for entry in logs)


def test_ema__skips_integers_and_averages_float_buffers():
    class Counting(EmaTeacher):
        def __init__(self):
            super().__init__()
            self.encoder, self.teacher = (torch.nn.BatchNorm1d(1) for _ in range(2))

    model = Counting()
    model.encoder.running_mean.fill_(1.0)
    model.encoder.num_batches_tracked.fill_(7)
    model.after_step(Progress(0, 1, 1, {"teacher_momentum": 0.75}))
    assert model.teacher.running_mean.item() == 0.25
    assert model.teacher.num_batches_tracked.item() == 0


def test_ema__of_a_constant_is_constant():
    average = torch.rand(5)
    before = average.clone()
    for _ in range(100):
        update_ema_([average], [before], 0.9998)
    assert torch.equal(average, before)


@pytest.mark.parametrize(
    ("momentum", "start", "ramp", "num_steps", "step", "expected"),
    [
        (0.9998, 0.0, 0, 1000, 0, 0.9998),
        (0.9998, 0.999, 25_000, 100_000, 12_500, 0.9994),  # the default of the authors' code
        (0.9998, 0.999, 25_000, 100_000, 60_000, 0.9998),
        (1.0, 0.996, 0, 1000, 500, 0.998),
        (0.0, 0.0, 0, 500_800, 0, 0.9998),
        (0.0, 0.0, 0, 10_000, 0, 0.995),
        (0.0, 0.0, 0, 1, 0, 0.5),
    ],
)
def test_momentum__is_constant_or_rises_and_follows_the_length_of_the_run(
    momentum, start, ramp, num_steps, step, expected
):
    assert momentum_schedule(momentum, start, ramp, num_steps).at(step) == pytest.approx(expected)


def test_collapse__is_seen_in_the_log_and_pooled_over_micro_batches():
    model = tiny_model("data2vec").eval()
    first, second = (model(**tiny_batch("data2vec", num)).metrics for num in (3, 6))
    with torch.no_grad():
        rows = []
        for num in (3, 6):
            batch = tiny_batch("data2vec", num)
            masked = batch["bool_masked_pos"].flatten().nonzero().squeeze(1)
            rows.append(model.teacher_targets(model.standardize(batch["pixel_values"]), masked))
    pooled = model.summarize_metrics({name: first[name] + second[name] for name in first})
    assert pooled["target_std"] == pytest.approx(torch.cat(rows).std(0, correction=0).mean().item(), rel=1e-4)
    assert model.describe_metrics(pooled) == [f"target std {pooled['target_std']:.3f}"]
    assert model.collapse_signs(pooled) is None
    assert "std 0.020, below 0.1): lower the learning rate" in model.collapse_signs({"target_std": 0.02})


@pytest.mark.parametrize(
    ("num_blocks", "num_targets", "layer_scale", "drop_path", "attention_dropout"),
    [(4, 2, 1e-4, 0.25, 0.05), (12, 6, 1e-4, 0.25, 0.05), (24, 6, 1e-5, 0.2, 0.15)],
)
def test_config__has_the_authors_values_for_the_depth(
    num_blocks, num_targets, layer_scale, drop_path, attention_dropout
):
    config = Data2VecConfig(encoder_config={"num_hidden_layers": num_blocks})
    encoder = config.encoder_config
    assert (config.num_target_layers, config.smooth_l1_beta, config.post_target_layer_norm) == (num_targets, 2.0, True)
    found = encoder.layer_scale_init_value, encoder.drop_path_rate, encoder.attention_probs_dropout_prob
    assert found == (layer_scale, drop_path, attention_dropout)
    assert (encoder.layer_norm_eps, encoder.use_shared_relative_position_bias) == (1e-6, True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_target_layers": 13}, r"num_target_layers is 13, expected 1 to 12"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5, expected 0 to 1"),
        ({"smooth_l1_beta": -1.0}, r"smooth_l1_beta is -1\.0"),
        ({"exported_weights": "both"}, r"exported_weights is 'both', expected 'teacher' or 'student'"),
    ],
)
def test_config__refuses_what_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        Data2VecConfig(**setting)


def test_export__gives_the_student_on_request(tmp_path):
    from hub.export.native import export

    settings = tiny_model("data2vec").config.to_dict()
    encoder = {key: settings["encoder_config"][key] for key in ("hidden_size", "num_attention_heads", "image_size")}
    encoder |= {"num_hidden_layers": 2, "intermediate_size": 64, "patch_size": 8, "use_relative_position_bias": True}
    model = Data2VecForPreTraining(Data2VecConfig(encoder_config=encoder, exported_weights="student"))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1)
    export(model, tmp_path, method="data2vec", recipe={})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "data2vec-vision"
    exported = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(exported.layernorm.bias, model.encoder.layernorm.bias)
    assert not torch.equal(exported.layernorm.bias, model.teacher.layernorm.bias)


def test_compile__is_one_graph():
    model, batch = tiny_model("data2vec").eval(), tiny_batch("data2vec")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(**batch).loss, model(**batch).loss)
