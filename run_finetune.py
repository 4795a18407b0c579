"""Fine-tune an encoder on labeled images: `accelerate launch run_finetune.py --model out --dataset ./labeled`.

Settings (the encoder's own published recipe) -> labeled images -> model -> plan -> Trainer -> a folder that
transformers opens, with metrics.json and a card. What the labels are is the --task, a file in tasks/. `--help` lists
the flags.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import EarlyStoppingCallback, PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from commands.arithmetic import Hardware
from commands.artifacts import FinetuneArtifacts
from commands.batch_size import TrialStep, with_batch_size
from commands.few_labels import with_rate_for_few_labels, with_rules_for_few_labels
from commands.finetune_plan import FinetunePlan
from commands.finetune_settings import chosen_task, load_finetune_settings
from commands.job import train
from commands.launch import find_hardware, first_on_main, join, limit_shard_cache, run
from commands.memory import Footprint, in_training, measure_footprint
from commands.output_folder import BAD_IMAGES_FILE, refuse_finished
from commands.parsing import make_parser
from commands.time_budget import fit_to_budget
from hub.image_stats import image_stats
from hub.open_model import open_config
from modeling.patches import patch_grid
from tasks import SETTINGS, TASKS, Task
from training.callbacks import show_progress
from training.finetune_trainer import EvaluateStart, FinetuneTrainer, freeze

_WRITTEN_LAST = "config.json"
_SHORTER = "--max_steps with a smaller number, a smaller encoder, or --mode linear"


def main(argv: list[str]) -> None:
    settings = load_finetune_settings(argv, SETTINGS, encoder_config)
    state, log = join(settings.use_cpu)
    first_on_main(state, partial(refuse_finished, settings, _WRITTEN_LAST))
    limit_shard_cache(settings)

    # The encoder and the labeled images make the task, which makes the model.
    config, (stats, notes) = encoder_config(settings.model), image_stats(settings.model)
    if settings.measured is not None and "value_range" not in stats:
        raise ValueError(
            f"--model {settings.model} takes measurements, but has no preprocessor_config.json with their value_range "
            "and statistics; copy it from the folder that the pre-training wrote"
        )
    splits = first_on_main(state, lambda: TASKS[settings.task].open_splits(settings))
    settings, rules = with_rules_for_few_labels(settings, config, len(splits.by_name["train"]))
    task = TASKS[settings.task](settings, config, stats, splits)
    set_seed(settings.seed)
    model = task.build_model()
    freeze(model, settings.mode, settings.num_trained_blocks)

    hardware, footprint = find_hardware(state), measure_footprint(in_training(model), task.black_batch(1))
    trial = TrialStep(lambda: model, task.black_batch)
    settings, size_notes = with_batch_size(settings, hardware, len(splits.by_name["train"]), footprint, trial)
    plan = plan_run(replace(task, settings=settings), footprint, hardware, [])
    settings, rate_notes = with_rate_for_few_labels(settings, config, plan.images_per_step)
    notes = [*notes, *size_notes, *rules, *rate_notes]
    fitted = fit_to_budget(
        settings,
        lambda settings: plan_run(replace(task, settings=settings), footprint, hardware, notes),
        lambda plan: build_trainer(replace(task, settings=plan.settings), plan, copy.deepcopy(model)),
    )
    task = replace(task, settings=fitted.settings)
    plan = plan_run(task, footprint, hardware, [*notes, *fitted.notes])

    def build(plan: FinetunePlan, checkpoint: Path | None) -> FinetuneTrainer:
        is_new = checkpoint is None and not settings.dry_run
        if is_new and (found := task.fit_head(model, state.device)):
            log(found)
        return build_trainer(task, plan, model)

    train(
        plan,
        splits.bad,
        _WRITTEN_LAST,
        build_trainer=build,
        finish=FinetuneArtifacts(task, argv, log).finish,
        shorter=_SHORTER,
        check=task.check_checkpoint,
        callbacks=fitted.callbacks,
    )


def encoder_config(name: str) -> PreTrainedConfig:
    return open_config(name, accepts_whole_model=False)


def plan_run(task: Task, footprint: Footprint, hardware: Hardware, notes: list[str]) -> FinetunePlan:
    settings, by_name = task.settings, task.splits.by_name
    source, sizes = task.splits.describe()
    counts = ", ".join(f"{len(split):,} {name}" for name, split in by_name.items())
    return FinetunePlan.make(
        settings,
        hardware,
        num_images=(len(by_name["train"]), len(by_name.get("validation", ()))),
        footprint=footprint,
        data=f"{source}: {counts}; {sizes}",
        grid=patch_grid(settings.image_size, task.encoder_config.patch_size),
        notes=[*notes, *task.splits.notes, *task.notes()],
        metrics=task.metrics,
        rows_of_task=task.plan_rows(),
    )


def build_trainer(task: Task, plan: FinetunePlan, model: PreTrainedModel) -> FinetuneTrainer:
    """Create the data sets, the trainer and its callbacks."""
    settings, bad_images = task.settings, plan.output_dir / BAD_IMAGES_FILE
    if PartialState().is_main_process:
        task.before_training(plan.output_dir)
    trainer = FinetuneTrainer(
        model=model,
        args=TrainingArguments(**plan.training_arguments(), label_names=list(task.label_names)),
        train_dataset=task.training_set(bad_images),
        eval_dataset=task.evaluation_set("validation", bad_images),
        data_collator=task.collate,
        compute_metrics=lambda outputs: task.compute_metrics(outputs.predictions, outputs.label_ids),
        loss=task.loss,
        layer_decay=settings.layer_decay,
        ema_decay=settings.ema_decay,
        flops_per_image=plan.footprint.flops_per_image,
        **task.image_stats,
    )
    show_progress(trainer, bad_images, task.splits.bad, settings.max_bad_fraction, task.describe_metrics)
    if settings.schedule == "auto" and settings.has_rules_for_few_labels:
        trainer.add_callback(EvaluateStart(trainer))
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    return trainer


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, lambda: make_parser(SETTINGS[chosen_task(sys.argv[1:])])))
