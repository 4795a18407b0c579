"""Collapse: what the statistics of targets are, and who is warned and stopped."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZE, tiny_arguments, tiny_collator, tiny_images, tiny_model
from pretraining_command import pretrain
from safetensors.torch import save_file
from transformers.trainer_utils import rotate_checkpoints

from data.sources import open_source
from evaluation.online import open_feature_spread
from evaluation.online_history import summarize_spread
from modeling.collapse import (
    distribution_sums,
    marginal_entropy,
    mean_entropy,
    row_moments,
    std_between_rows,
)
from modeling.data2vec import Data2VecForPreTraining
from training.collapse import CollapseError, WatchForCollapse, describe_collapse, standing_signs
from training.online_evaluation import EvaluateOnline
from training.trainer import MimTrainer


def test_statistics__add_up_over_micro_batches():
    torch.manual_seed(0)
    rows, probabilities = torch.randn(12, 5), torch.randn(12, 7).softmax(1)
    std = std_between_rows(row_moments(rows[:4]) + row_moments(rows[4:]))
    assert std.item() == pytest.approx(rows.std(0, correction=0).mean().item(), rel=1e-5)
    first, second = distribution_sums(probabilities[:4]), distribution_sums(probabilities[4:])
    sums = {name: first[name] + second[name] for name in first}
    expected = -(probabilities * probabilities.log()).sum(1).mean()
    assert mean_entropy(sums["entropy"]).item() == pytest.approx(expected.item(), rel=1e-5)
    mean = probabilities.mean(0)
    assert marginal_entropy(sums["marginal"]).item() == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-5)


def test_entropies__tell_equal_rows_from_uniform_ones():
    sharp, one, uniform = torch.eye(8), torch.eye(8)[:1].repeat(8, 1), torch.full((8, 8), 1 / 8)
    values = []
    for rows in (sharp, one, uniform):
        sums = distribution_sums(rows)
        values.extend((mean_entropy(sums["entropy"]).item(), marginal_entropy(sums["marginal"]).item()))
    assert values == pytest.approx([0, math.log(8), 0, 0, math.log(8), math.log(8)], abs=1e-6)


# ---- the warning and the stop ----


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Runs of these tests are short."""
    monkeypatch.setattr("training.collapse._NUM_STEPS", 0)


class Watched(torch.nn.Module):
    """A model whose features collapse at a std below 0.1."""

    def collapse_signs(self, logs):
        std = logs.get("feature_std", 1.0)
        return f"the features are equal (std {std}): change `learning_rate`." if std < 0.1 else None


def watched(folder, stds, max_steps=100, warmup_steps=0, head_steps=0, stops=True, initial=1.0):
    """A callback after evaluations at steps 10, 20, ..., each followed by a checkpoint that rotation may delete."""
    history = [{"step": 0, "eval_feature_std": initial}]
    state = SimpleNamespace(log_history=history, global_step=0, max_steps=max_steps, is_world_process_zero=True)
    args = SimpleNamespace(save_total_limit=1, get_warmup_steps=lambda num_steps: warmup_steps)
    heads = SimpleNamespace(num_steps=head_steps)
    trainer = SimpleNamespace(model=Watched(), state=state, args=args, output_dir=folder, head_warmup=heads)
    watch = WatchForCollapse(trainer, stops)
    watch.on_train_begin(args, state, None)
    for number, std in enumerate(stds, start=1):
        state.global_step = 10 * number
        history.append({"step": state.global_step, "eval_feature_std": std})
        history.append({"step": state.global_step, "eval_loss": 1.0})
        watch.on_evaluate(args, state, None)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        checkpoint.mkdir()
        save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({}, checkpoint / name)
        (checkpoint / "trainer_state.json").write_text("{}")
        rotate_checkpoints(str(folder), args.save_total_limit)
    return trainer


def test_collapse__stops_after_three_signs_in_a_row_and_keeps_the_checkpoint_before(tmp_path, capsys):
    with pytest.raises(CollapseError) as caught:
        watched(tmp_path, [0.5, 0.05, 0.5, 0.05, 0.04, 0.03, 0.02])
    assert str(caught.value) == (
        "the model collapsed. Step 60: the features are equal (std 0.03): change `learning_rate`. All 3 evaluations "
        f"since step 40 show it; the last checkpoint from before is {tmp_path}/checkpoint-30: continue from it with "
        "`resume_from_checkpoint`, or set `stop_on_collapse` to false to go on"
    )
    assert (tmp_path / "checkpoint-30").is_dir()
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(": the")[0] for line in warnings] == [f"warning: step {step}" for step in (20, 40, 50, 60)]


def test_collapse__that_passes_lets_old_checkpoints_be_deleted_again(tmp_path):
    trainer = watched(tmp_path, [0.5, 0.05, 0.05, 0.5])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-40"]
    assert describe_collapse(trainer) is None


@pytest.mark.parametrize(
    "how",
    [
        {"stops": False},
        {"warmup_steps": 30},
        {"warmup_steps": 10, "head_steps": 15},
        {"initial": 0.05},
        {"max_steps": 30},
    ],
    ids=lambda how: next(iter(how)),
)
def test_collapse__does_not_stop_a_run(how, tmp_path, capsys):
    """On request, during warm-up and that of new heads before, on images that are nearly equal, or at its end."""
    trainer = watched(tmp_path, [0.05, 0.05, 0.05], **how)
    warned = "stops" in how or "max_steps" in how
    assert capsys.readouterr().err.count("warning: step") == (3 if warned else int("warmup_steps" in how))
    if warned:
        sign = "since step 10 the features are equal (std 0.05): change `learning_rate`"
        assert describe_collapse(trainer) == f"the model collapsed: {sign}"
        trainer.state.log_history = [entry for entry in trainer.state.log_history if entry["step"] != 10]
        maybe = "the model may have collapsed, or was trained too shortly"
        assert describe_collapse(trainer) == f"{maybe}: {sign.replace('10', '20')}"


def test_collapse__within_few_steps_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.collapse._NUM_STEPS", 40)
    trainer = watched(tmp_path, [0.05] * 4 + [0.5])
    assert capsys.readouterr().err.count("warning: step") == 4
    assert describe_collapse(trainer) is None
    longer = tmp_path / "longer"
    longer.mkdir()
    with pytest.raises(CollapseError, match="All 5 evaluations since step 10 show it;"):
        watched(longer, [0.05] * 5 + [0.5])


def test_collapse__is_not_asked_of_other_models(tmp_path):
    assert standing_signs(SimpleNamespace(model=torch.nn.Linear(1, 1))) == []


def short_run(folder, num_steps, teacher_momentum, learning_rate):
    """data2vec on photographs, evaluated every 10 steps, by the features of all images beside the loss."""
    model = tiny_model("data2vec", layer_scale_init_value=1.0)
    model.config.teacher_momentum = teacher_momentum
    often = {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 10}
    settings = {"max_steps": num_steps, "learning_rate": learning_rate, "save_total_limit": 1}
    images = tiny_images(variant="data2vec", train=False)
    trainer = MimTrainer(
        model=model,
        args=tiny_arguments(folder, **often, **settings),
        train_dataset=tiny_images(variant="data2vec"),
        eval_dataset=images,
        data_collator=tiny_collator("data2vec", with_image_index=True),
    )
    spread = open_feature_spread(images.samples, (SIZE, SIZE), num_channels=3)
    trainer.add_callback(EvaluateOnline(trainer, 10, spread, summarize_spread))
    trainer.add_callback(WatchForCollapse(trainer))
    return trainer


def test_run__with_a_fast_teacher_and_a_high_learning_rate_is_named_within_two_evaluations(tmp_path, capsys):
    trainer = short_run(tmp_path, num_steps=41, teacher_momentum=0.5, learning_rate=1.0)
    with pytest.raises(CollapseError, match=r"All 3 evaluations since step [12]0 show it;") as caught:
        trainer.train()
    said = capsys.readouterr().err
    assert re.search(
        r"warning: step 20: the (targets of all patches|features of all images) are nearly equal \(std 0", said
    )
    assert "lower the learning rate, or raise teacher_momentum." in said
    checkpoint = tmp_path / f"checkpoint-{max(0, trainer.state.global_step - 30)}"
    assert f"the last checkpoint from before is {checkpoint}:" in str(caught.value)
    assert checkpoint.is_dir()


def test_run__that_learns_is_not_named(tmp_path, capsys):
    trainer = short_run(tmp_path, num_steps=20, teacher_momentum=0.9, learning_rate=2e-3)
    trainer.train()
    assert standing_signs(trainer) == []
    assert "warning" not in capsys.readouterr().err
    spread = {entry["step"]: entry for entry in trainer.state.log_history if "eval_rankme" in entry}
    assert list(spread) == [0, 10, 20]
    assert all(entry["eval_feature_std"] > 0.5 for entry in spread.values())


ARGUMENTS = [
    *("--method", "data2vec", "--model", "vit-nano", "--image_size", "32", "--per_device_train_batch_size", "8"),
    *("--use_cpu", "--validation_fraction", "0.3", "--eval_steps", "1", "--warmup_steps", "0"),
    *("--save_total_limit", "1"),
]


@pytest.mark.parametrize(("more", "exit_code"), [(["--max_steps", "5"], 5), (["--stop_on_collapse", "false"], 0)])
def test_command__stops_or_repeats_the_warning_at_the_end_and_in_the_card(
    more, exit_code, tmp_path, capsys, monkeypatch
):
    sign = "the features are equal: raise teacher_momentum."
    monkeypatch.setattr(Data2VecForPreTraining, "collapse_signs", lambda model, logs: sign if "loss" in logs else None)
    source, images, out = open_source("sample-fashion"), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for index in range(12):
        (images / f"{index}.png").write_bytes(source.read(index))
    arguments = [*ARGUMENTS, "--max_steps", "3", *more, "--dataset", str(images), "--output_dir", str(out)]
    assert pretrain(arguments) == exit_code
    said = capsys.readouterr()
    assert f"warning: step 3: {sign}" in said.err
    history = json.loads((out / "trainer_state.json").read_text())["log_history"] if not exit_code else []
    if exit_code:
        assert (
            f"the last checkpoint from before is {out}/checkpoint-0: continue from it with --resume_from" in said.err
        )
        assert "or set --stop_on_collapse to false to go on" in said.err
        assert not (out / "README.md").exists()
    else:
        problem = f"the model collapsed: since step 1 {sign[:-1]}"
        assert f"warning: {problem}" in said.out
        assert f"**Warning: {problem}.**" in (out / "README.md").read_text()
        assert sum("eval_rankme" in entry for entry in history) == 4
