"""Trainer for fine-tuning: frozen layers, the loss of a task, and checkpoints with current key names.

Shapes: C channels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from modeling.patches import ValueRange, standardize
from training.layer_decay import depths_of, layer_id, layer_ids
from training.trainer import MimTrainer

# No weight decay, beside 1-D tensors, as in the authors' code (which decays the bias tables of a BEiT).
_NO_WEIGHT_DECAY = ("cls_token", "distillation_token", "position_embeddings")
_NO_WEIGHT_DECAY_IN_SWIN = ("relative_position_bias_table",)


def freeze(model: PreTrainedModel, mode: str, num_trained_blocks: int) -> None:
    """Freeze the whole encoder, `model.base_model`, for "linear", or all but its last blocks for "partial".

    Raises:
        ValueError: If the encoder has fewer than `num_trained_blocks` blocks.
    """
    if mode == "finetune":
        return
    ids = layer_ids(model)
    num_blocks = max(ids.values()) - 1
    if mode == "partial" and num_trained_blocks > num_blocks:
        raise ValueError(f"num_trained_blocks is {num_trained_blocks}, but this encoder has {num_blocks} blocks")
    last_frozen = {"partial": num_blocks - num_trained_blocks, "linear": num_blocks + 1}[mode]
    for name, parameter in model.named_parameters():
        is_head = not name.startswith(f"{model.base_model_prefix}.")
        if not (is_head or ids[name] > last_frozen):
            parameter.requires_grad_(False)
    encoder: Any = model.base_model
    depths = depths_of(encoder.config)
    for name, module in encoder.named_modules():
        # Dropping the path of a frozen block would only add noise to the input of the blocks that train.
        if hasattr(module, "drop_prob") and layer_id(f"{name}.", depths) <= last_frozen:
            module.drop_prob = 0.0


class EvaluateStart(TrainerCallback):
    """Evaluate before the first step, so that a model that gets worse ends with the weights that it started with."""

    def __init__(self, trainer: "FinetuneTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step or not args.load_best_model_at_end:
            return
        name = args.metric_for_best_model.removeprefix("eval_")
        metric = self.trainer.evaluate()[f"eval_{name}"]
        if math.isfinite(metric):
            state.best_metric, state.best_global_step = metric, 0
            state.best_model_checkpoint = str(self.trainer.output_dir / "checkpoint-0")


class FinetuneTrainer(MimTrainer):
    """`MimTrainer` for a model on a pre-trained encoder, its `base_model`, and batches of stored `pixel_values`.

    Args:
        loss: `loss(model, batch, counters)` returns the mean loss over the images and the outputs to evaluate, from a
            batch with standardized images. The counters (step, micro-batch and process) seed its random choices; in
            evaluation they are None.
        image_mean, image_std: (C,), mean and standard deviation of each channel, in [0, 1].
        value_range: Of measurements, the lowest and highest value of each channel.
    """

    model: Any

    def __init__(
        self,
        *args: Any,
        loss: Callable[[Any, dict[str, Any], tuple[int, ...] | None], tuple[torch.Tensor, dict[str, Any]]],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        value_range: ValueRange | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # some native classes sum the loss over micro-batches or processes
        self.loss = loss
        self.image_stats: Any = torch.tensor([image_mean, image_std], device=self.args.device)  # (2, C)
        if value_range is not None:
            self.image_stats = (image_mean, image_std, value_range)

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        batch = {**inputs, "pixel_values": standardize(inputs["pixel_values"], *self.image_stats)}
        counters = (self.state.global_step, self._micro_step, self.args.process_index)
        return self.loss(model, batch, counters if model.training else None)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self.get_eval_dataloader(test_dataset)  # `Trainer` would drop the last, smaller batch

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        is_swin = self.model.base_model.config.model_type == "swin"
        exempt = (*_NO_WEIGHT_DECAY, *(_NO_WEIGHT_DECAY_IN_SWIN if is_swin else ()))
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(exempt)]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # By default native models are saved with the key names of transformers 4, which `Trainer` then loads with
        # strict=False: resuming, or loading the best weights, would silently lose every transformer block.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained
