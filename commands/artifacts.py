"""Output of a pre-training run: a native encoder at the root, the whole model in `pretraining/`, and a model card."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.launch import launcher, software_and_hardware
from commands.output_folder import BAD_IMAGES_FILE, CURVE_FILE, PANEL_FILE, PANELS, SETTINGS_FILE
from commands.pretraining_settings import PretrainingSettings
from data.bad_images import BadImages
from data.splits import PretrainingSplits
from evaluation.online_history import results_at
from evaluation.pictures import training_curve
from hub.checkpoints import stage_checkpoint
from hub.export.native import PRETRAINING, export, native_root_problem
from hub.model_card import write_model_card
from hub.redaction import shorten_values
from training.trainer import MimTrainer


@dataclass(frozen=True)
class Artifacts:
    """Writer of the output of a run, with the weights that the trainer has at that time.

    Args:
        argv: Command line without the name of the command.
    """

    settings: PretrainingSettings
    splits: PretrainingSplits
    argv: list[str]

    def finish(self, trainer: MimTrainer) -> str:
        """Evaluate the weights unless the last evaluation did, and write everything; returns a description."""
        trainer.evaluate_at_the_end()
        trainer.save_state()
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
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        # A config that is uploaded must not contain folders of this computer.
        export(model, folder, method=self.settings.method, recipe=shorten_values(self.settings.as_recipe()))
        self._write_card(trainer, folder, unfinished)

    def _write_card(self, trainer: MimTrainer, folder: Path, unfinished: str | None) -> None:
        settings, splits, output_dir = self.settings, self.splits, trainer.output_dir
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        history = trainer.state.log_history
        encoder = model.exported_encoder
        dataset = " + ".join(settings.eval_dataset or [])
        curve = panel = None
        if any("loss" in entry or "eval_loss" in entry for entry in history):
            training_curve(history, folder / (curve := CURVE_FILE))
        if panels := sorted((output_dir / PANELS).glob("*.png")):
            shutil.copy(panels[-1], folder / (panel := PANEL_FILE))
        metrics = {
            name: [entry[key] for entry in history if key in entry][-1]
            for name, key in (("train_loss", "loss"), ("eval_loss", "eval_loss"))
            if any(key in entry for entry in history)
        }
        write_model_card(
            folder,
            command=shlex.join([*launcher(), "run_pretraining.py", *self.argv]),
            method=settings.method,
            model_name=settings.hub_model_id or output_dir.name,
            base_model=settings.init_from,
            recipe=settings.as_recipe(),
            data_summary={
                "dataset": splits.train.source.describe(),
                "training images": len(splits.train),
                "validation images": len(splits.validation),
                "sizes": splits.summary.describe(),
                "unreadable images left out": len(BadImages.read(output_dir / BAD_IMAGES_FILE)),
            },
            metrics=metrics,
            versions=software_and_hardware(trainer),
            panel=panel,
            curve=curve,
            license=settings.license,
            datasets=settings.dataset,
            unfinished=unfinished,
            online_results=results_at(history, trainer.state.global_step, dataset),
            num_extra_tokens=sum(hasattr(encoder.embeddings, f"{kind}_token") for kind in ("cls", "distillation")),
            pools_mean=getattr(encoder.config, "use_mean_pooling", False),
            native_root_problem=native_root_problem(model),
        )
