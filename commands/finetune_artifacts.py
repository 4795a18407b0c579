"""Write the result of a fine-tuning: metrics.json, a figure, the model card and the exported model."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from commands.launch import launcher, software_and_hardware
from commands.output_folder import BAD_IMAGES_FILE, CURVE_FILE, METRICS_FILE
from data.bad_images import BadImages
from evaluation.pictures import training_curve
from hub.model_card import write_model_card
from hub.redaction import shorten_paths
from training.finetune_trainer import FinetuneTrainer


@dataclass(frozen=True)
class FinetuneArtifacts:
    """The files that a run leaves behind.

    Args:
        task: The `tasks.Task` of the run.
        argv: The arguments of the command.
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
                    self._write_metrics(trainer, split, results)
                    figure = task.draw(predictions, labels, dataset, output_dir, title)
            if trainer.is_world_process_zero():
                self._write_card(trainer, figure)
                task.export(trainer.accelerator.unwrap_model(trainer.model), output_dir)
        trainer.accelerator.wait_for_everyone()
        return f"{task.how_to_open(output_dir)}; card in README.md"

    def _write_metrics(self, trainer: FinetuneTrainer, split: str, results: list[dict[str, Any]]) -> None:
        arguments, settings = trainer.args, self.task.settings
        is_best = arguments.load_best_model_at_end
        content = {
            "dataset": shorten_paths(" + ".join(settings.dataset)),
            "part": split,
            "num_labels": len(self.task.splits.by_name["train"]),
            "seed": settings.seed,
            "weights": f"best {arguments.metric_for_best_model} on the validation part" if is_best else "last step",
            "results": results,
        }
        text = json.dumps(content, indent=2) + "\n"
        (trainer.output_dir / METRICS_FILE).write_text(text, encoding="utf-8")

    def _write_card(self, trainer: FinetuneTrainer, figure: str | None) -> None:
        task, settings = self.task, self.task.settings
        folder, history = trainer.output_dir, trainer.state.log_history
        if any("loss" in entry or "eval_loss" in entry for entry in history):
            training_curve(history, folder / CURVE_FILE)
        source, sizes = task.splits.describe()
        write_model_card(
            folder,
            command=shlex.join([*launcher(), "run_finetune.py", *self.argv]),
            method=task.pretraining[0] or task.encoder_config.model_type,
            model_name=settings.hub_model_id or folder.name,
            base_model=None if settings.from_scratch else settings.model,
            recipe=settings.as_recipe(),
            data_summary={
                "dataset": source,
                **{f"{name} images": len(split) for name, split in task.splits.by_name.items()},
                "sizes": sizes,
                "unreadable images left out": len(BadImages.read(folder / BAD_IMAGES_FILE)),
            },
            metrics={},
            versions=software_and_hardware(trainer),
            panel=figure,
            curve=CURVE_FILE if (folder / CURVE_FILE).is_file() else None,
            license=settings.license,
            datasets=settings.dataset,
            task=task.card(),
            from_scratch=settings.from_scratch,
        )
