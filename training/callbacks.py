"""Progress of a training: a bar with images per second, panels of predictions, and limits on unreadable images."""

import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from data.bad_images import BadImages
from data.streams import StreamDataset


def show_progress(
    trainer: Trainer,
    bad_images: Path,
    excluded: BadImages,
    max_bad_fraction: float,
    describe_metrics: Callable[[dict[str, Any]], list[str]] | None = None,
) -> None:
    """Replace `Trainer`'s progress bar and limit unreadable images.

    Args:
        excluded: Unreadable images that were found before training.
        describe_metrics: Returns phrases about metrics for a line of the log; by default the model's.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    model: Any = trainer.model
    trainer.add_callback(MimProgress(describe_metrics or getattr(model, "describe_metrics", None)))
    arguments, dataset = trainer.args, trainer.train_dataset
    num_images = arguments.max_steps * arguments.train_batch_size * arguments.world_size
    if has_length(dataset) and not isinstance(dataset, StreamDataset):
        num_images = len(dataset)  # type: ignore[arg-type]
    trainer.add_callback(BadImagesLimit(bad_images, num_images, max_bad_fraction, excluded.keys()))


def show_panels(
    trainer: Any,
    folder: Path,
    batch: dict[str, Any],
    draw: Callable[[Any, dict[str, Any], int, float | None], Image.Image],
) -> None:
    """Add `ReconstructionPanels`, which are also written to TensorBoard if the run reports to it."""
    boards = [each for each in trainer.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
    trainer.add_callback(ReconstructionPanels(folder, batch, draw, boards[0] if boards else None, trainer))


class MimProgress(ProgressCallback):
    """`Trainer`'s bar with loss, images/s, share of waiting for data and time left; lines without a terminal."""

    def __init__(self, describe_metrics: Callable[[dict[str, Any]], list[str]] | None) -> None:
        super().__init__()
        self.describe_metrics = describe_metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            first = state.global_step
            silent = not sys.stderr.isatty()
            self.training_bar = tqdm(
                total=state.max_steps, initial=first, unit="step", dynamic_ncols=True, disable=silent
            )

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        text = describe_log(logs, self.describe_metrics)
        if not text:
            return
        if not self.training_bar.disable and "loss" in logs:
            self.training_bar.set_postfix_str(text)
        else:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}  {text}", file=sys.stderr)


def describe_log(logs: dict[str, Any], describe_metrics: Callable[[dict[str, Any]], list[str]] | None = None) -> str:
    """Return a line with the losses, the model's metrics and the speed, as far as they are logged."""
    phrases = []
    if "loss" in logs:
        phrases.append(f"loss {logs['loss']:.4f}")
        phrases.append(f"lr {logs.get('learning_rate', 0):.2e}")
    if "eval_loss" in logs:
        phrases.append(f"validation loss {logs['eval_loss']:.4f}")
    if describe_metrics is not None:
        phrases += describe_metrics(logs)
    if "images_per_second" in logs:
        phrases.append(f"{logs['images_per_second']:.3g} images/s")
        if "flops_per_second" in logs:
            utilization = logs.get("model_flops_utilization")
            share = "" if utilization is None else f" (MFU {utilization:.0%})"
            phrases.append(f"{logs['flops_per_second'] / 1e12:.3g} TFLOP/s{share}")
        workers = f", workers use {logs['worker_cpu_share']:.0%} of the CPU" if "worker_cpu_share" in logs else ""
        phrases.append(f"waits {logs['data_wait_share']:.0%} for data{workers}")
        phrases.append(f"{duration(logs['eta_seconds'])} left")
    return "  ".join(phrases)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 90 -> "1 min 30 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


class ReconstructionPanels(TrainerCallback):
    """Write a panel of the same images and masks at every evaluation, or at every checkpoint without evaluation.

    Args:
        folder: Folder of the PNG files.
        batch: A batch of the collator.
        draw: `draw(model, batch, step, eval_loss)` returns the panel.
        trainer: A `MimTrainer`, whose model may be sharded.
    """

    def __init__(
        self,
        folder: Path,
        batch: dict[str, Any],
        draw: Callable[[Any, dict[str, Any], int, float | None], Image.Image],
        tensorboard: TensorBoardCallback | None,
        trainer: Any = None,
    ) -> None:
        self.folder, self.batch, self.draw, self.tensorboard = folder, batch, draw, tensorboard
        self.trainer = trainer

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: dict | None = None, **kwargs: Any
    ) -> None:
        self._write_on_main_process(model, state, (metrics or {}).get("eval_loss"))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.eval_strategy == "no":  # there are no validation images
            self._write_on_main_process(model, state, None)

    def _write_on_main_process(self, model: Any, state: Any, eval_loss: float | None) -> None:
        with nullcontext() if self.trainer is None else self.trainer.whole_model():
            if state.is_world_process_zero:
                self._write(model if self.trainer is None else self.trainer.model, state.global_step, eval_loss)

    def _write(self, model: Any, step: int, eval_loss: float | None) -> None:
        panel = self._draw(model, step, eval_loss)
        self.folder.mkdir(parents=True, exist_ok=True)
        panel.save(self.folder / f"step-{step:07d}.png", optimize=True)
        if self.tensorboard is not None and self.tensorboard.tb_writer is not None:
            pixels = np.asarray(panel.convert("RGB"))
            self.tensorboard.tb_writer.add_image("reconstructions", pixels, step, dataformats="HWC")

    @torch.no_grad()
    def _draw(self, model: Any, step: int, eval_loss: float | None) -> Image.Image:
        was_training = model.training
        device = next(model.parameters()).device
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in self.batch.items()}
        model.eval()
        try:
            return self.draw(model, batch, step, eval_loss)
        finally:
            model.train(was_training)


class BadImagesLimit(TrainerCallback):
    """Stop training if too many images turn out to be unreadable when they are decoded.

    `known`: Names in `file` that are not among the `num_images`, because they were left out before training.
    """

    def __init__(self, file: Path, num_images: int, max_bad_fraction: float, known: Collection[str] = ()) -> None:
        self.file, self.num_images, self.max_bad_fraction, self.known = file, num_images, max_bad_fraction, known

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = BadImages.read(self.file)
        bad = BadImages((name, reason) for name, reason in found.items() if name not in self.known)
        if len(bad) > self.max_bad_fraction * self.num_images:
            raise ValueError(
                f"{len(bad)} of {self.num_images} images cannot be read ({bad.describe()}), listed in {self.file}: "
                "repair or remove them, or allow more with max_bad_fraction"
            )
