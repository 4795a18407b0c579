"""Output of a run: model, figures, metrics and model card."""

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from commands.channels import channel_names, describe_values
from commands.launch import launcher, software_and_hardware
from commands.output_folder import BAD_IMAGES_FILE, CURVE_FILE, METRICS_FILE, PANEL_FILE, PANELS, SETTINGS_FILE
from commands.pretraining_settings import PretrainingSettings
from commands.settings import TrainingSettings
from data.bad_images import BadImages
from data.splits import PretrainingSplits
from evaluation.online_history import results_at
from evaluation.pictures import training_curve
from hub.checkpoints import stage_checkpoint
from hub.export.native import PRETRAINING, export, native_root_problem
from hub.measurements import usage
from hub.model_card import write_model_card
from hub.redaction import shorten_paths, shorten_values
from training.collapse import describe_collapse
from training.evaluation_guard import describe_non_finite
from training.finetune_trainer import FinetuneTrainer
from training.trainer import MimTrainer


@dataclass(frozen=True)
class Artifacts:
    """Writer of the output of a pre-training run, with the weights that the trainer has at that time.

    The root of the folder holds a native encoder, `pretraining/` the whole model.

    Args:
        argv: Command line without the name of the command.
        text_tokenizer: Written beside the text encoder, if there is one.
    """

    settings: PretrainingSettings
    splits: PretrainingSplits
    argv: list[str]
    text_tokenizer: Any = None

    def finish(self, trainer: MimTrainer) -> str:
        """Evaluate the weights unless the last evaluation did, and write everything; returns a description."""
        trainer.evaluate_at_the_end()
        trainer.save_state()
        with trainer.whole_model():
            if trainer.is_world_process_zero():
                self.write(trainer, trainer.output_dir)
        trainer.accelerator.wait_for_everyone()
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        encoder = "" if native_root_problem(model) else "encoder for AutoModel.from_pretrained, "
        return f"{encoder}whole model in {PRETRAINING}/, images in {PANELS}/, card in README.md"

    def stage(self, trainer: MimTrainer, folder: Path, checkpoint_name: str | None) -> None:
        """Write an upload during training: the output, and the training state if it has a name on the Hub."""
        step, last = trainer.state.global_step, trainer.state.max_steps
        self.write(trainer, folder, f"Training continues: this is step {step:,} of {last:,}." if step < last else None)
        if checkpoint_name is not None:
            output_dir = trainer.output_dir
            stage_checkpoint(output_dir / f"checkpoint-{step}", output_dir / SETTINGS_FILE, folder / checkpoint_name)

    def write(self, trainer: MimTrainer, folder: Path, unfinished: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings, splits, history = self.settings, self.splits, trainer.state.log_history
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        encoder, dataset = model.exported_encoder, " + ".join(settings.eval_dataset or [])
        metrics = {
            name: [entry[key] for entry in history if key in entry][-1]
            for name, key in (("train_loss", "loss"), ("eval_loss", "eval_loss"))
            if any(key in entry for entry in history)
        }
        write_card(
            trainer,
            folder,
            settings,
            self.argv,
            {
                "dataset": splits.train.source.describe(),
                "training images": len(splits.train),
                "validation images": len(splits.validation),
                "sizes": splits.summary.describe(),
                **self._values(model.config),
            },
            method=settings.method,
            base_model=settings.init_from,
            metrics=metrics,
            panel=copy_panel(trainer.output_dir, folder),
            panel_caption=model.panel_caption,
            unfinished=unfinished,
            online_results=results_at(
                history, trainer.state.global_step, dataset, "initial weights" if settings.init_from else None
            ),
            num_extra_tokens=num_extra_tokens(encoder),
            pools_mean=getattr(encoder.config, "use_mean_pooling", False),
            has_pooler=getattr(encoder, "native_has_pooler", True),
            has_classifier=encoder.config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            exported=model.exported,
            native_root_problem=native_root_problem(model),
            usage=self._usage(model.config, num_extra_tokens(encoder)),
        )
        # Last, because it marks a finished run. A config that is uploaded must not contain folders of this computer.
        recipe = shorten_values(settings.as_recipe())
        export(model, folder, method=settings.method, recipe=recipe, text_tokenizer=self.text_tokenizer)

    def _values(self, config: Any) -> dict[str, str]:
        """Return a row of the card about measurements."""
        measured = self.splits.train.source.measured
        if measured is None:
            return {}
        return {"values": describe_values(self.settings, measured.dtype, config.value_range)}

    def _usage(self, config: Any, num_extra_tokens: int) -> str:
        """Return how to prepare measurements, in place of the card's example for photographs."""
        if config.value_range is None:
            return ""
        names = channel_names(self.settings, len(config.value_range))
        patches = f"[:, {num_extra_tokens}:]" if num_extra_tokens else ""
        result = f"features = outputs.last_hidden_state{patches}.mean(1)  # mean of the patches"
        return usage(config.value_range, names, "AutoModel", result)


@dataclass(frozen=True)
class FinetuneArtifacts:
    """Writer of the output of a fine-tuning.

    Args:
        task: The `tasks.Task` of the run.
        argv: Command line without the name of the command.
        log: Prints on the main process only.
    """

    task: Any
    argv: list[str]
    log: Callable[[str], None]

    def finish(self, trainer: FinetuneTrainer) -> str:
        """Evaluate the final weights and write everything; return how to use the result."""
        task, output_dir = self.task, trainer.output_dir
        trainer.save_state()
        split, figure = task.splits.measured[0], None
        with trainer.averaged():
            dataset = task.evaluation_set(split, output_dir / BAD_IMAGES_FILE)
            if dataset is not None:
                outputs = trainer.predict(dataset)
                predictions, labels = np.asarray(outputs.predictions), np.asarray(outputs.label_ids)
                results, title = task.results(predictions, labels), f"{split} part, {len(dataset):,} images"
                values = "  ".join(f"{entry['metric'].replace('_', ' ')} {entry['value']:.4f}" for entry in results)
                self.log(f"{title}: {values}")
                if trainer.is_world_process_zero():
                    metric = f"best {trainer.args.metric_for_best_model} on the validation part"
                    content = {
                        "dataset": shorten_paths(" + ".join(task.settings.dataset)),
                        "part": split,
                        "num_labels": len(task.splits.by_name["train"]),
                        "seed": task.settings.seed,
                        "weights": metric if trainer.state.best_model_checkpoint else "last step",
                        "results": results,
                    }
                    text = json.dumps(content, indent=2) + "\n"
                    (output_dir / METRICS_FILE).write_text(text, encoding="utf-8")
            with trainer.whole_model():
                if trainer.is_world_process_zero():
                    model = trainer.accelerator.unwrap_model(trainer.model)
                    if dataset is not None:
                        figure = task.draw(predictions, labels, dataset, output_dir, title, model.eval())
                    self._write_card(trainer, figure)
                    task.export(model, output_dir)
        trainer.accelerator.wait_for_everyone()
        return f"{task.how_to_open(output_dir)}; card in README.md"

    def _write_card(self, trainer: FinetuneTrainer, figure: str | None) -> None:
        task, settings = self.task, self.task.settings
        source, sizes = task.splits.describe()
        sizes_of_splits = {f"{name} images": len(split) for name, split in task.splits.by_name.items()}
        write_card(
            trainer,
            trainer.output_dir,
            settings,
            self.argv,
            {"dataset": source, **sizes_of_splits, "sizes": sizes},
            method=task.pretraining[0] or task.encoder_config.model_type,
            base_model=None if settings.from_scratch else settings.model,
            metrics={},
            panel=figure,
            task=task.card(),
            from_scratch=settings.from_scratch,
        )


def write_card(
    trainer: MimTrainer,
    folder: Path,
    settings: TrainingSettings,
    argv: list[str],
    data_summary: Mapping[str, Any],
    **own: Any,
) -> None:
    """Draw the training curve and write the model card; `own` are arguments of `write_model_card`."""
    num_bad = len(BadImages.read(trainer.output_dir / BAD_IMAGES_FILE))
    warnings = describe_non_finite(trainer.state.log_history), describe_collapse(trainer)
    write_model_card(
        folder,
        command=shlex.join([*launcher(), settings.program["prog"], *argv]),
        model_name=settings.hub_model_id or trainer.output_dir.name,
        recipe=settings.as_recipe(),
        data_summary={**data_summary, "unreadable images left out": num_bad},
        versions=software_and_hardware(trainer),
        curve=draw_curve(trainer, folder),
        license=settings.license,
        datasets=settings.dataset,
        warning="; ".join(filter(None, warnings)) or None,
        **own,
    )


def draw_curve(trainer: Trainer, folder: Path) -> str | None:
    """Draw the training curve unless no loss was logged; return the name of the file."""
    history = trainer.state.log_history
    if not any("loss" in entry or "eval_loss" in entry for entry in history):
        return None
    training_curve(history, folder / CURVE_FILE, getattr(trainer.model, "training_loss_label", "training loss"))
    return CURVE_FILE


def num_extra_tokens(encoder: Any) -> int:
    """Return the number of tokens before the patches."""
    single = sum(hasattr(encoder.embeddings, f"{kind}_token") for kind in ("cls", "distillation"))
    return single + getattr(encoder.config, "num_register_tokens", 0)


def copy_panel(output_dir: Path, folder: Path) -> str | None:
    """Copy the last panel of the run, if there is one; return the name of the file."""
    if not (panels := sorted((output_dir / PANELS).glob("*.png"))):
        return None
    shutil.copy(panels[-1], folder / PANEL_FILE)
    return PANEL_FILE
