"""The trainer of classifiers: frozen layers, mixed images with soft targets, and checkpoints with current key names.

Shapes: B images of a micro-batch, C channels, H W pixels, K classes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from training.layer_decay import depths_of, layer_id, layer_ids
from training.mixing import Mixing
from training.trainer import MimTrainer

# No weight decay, beside 1-D tensors, as in the authors' code (which decays the bias tables of a BEiT).
_NO_WEIGHT_DECAY = ("cls_token", "distillation_token", "position_embeddings")
_NO_WEIGHT_DECAY_IN_SWIN = ("relative_position_bias_table",)


def freeze(model: PreTrainedModel, mode: str, num_trained_blocks: int) -> None:
    """Freeze everything but the classification head ("linear"), or everything below the last blocks ("partial").

    Raises:
        ValueError: If the encoder has fewer than `num_trained_blocks` blocks.
    """
    ids = layer_ids(model)
    num_blocks = max(ids.values()) - 1
    if mode == "partial" and num_trained_blocks > num_blocks:
        raise ValueError(f"num_trained_blocks is {num_trained_blocks}, but this encoder has {num_blocks} blocks")
    last_frozen = {"finetune": -1, "partial": num_blocks - num_trained_blocks, "linear": num_blocks + 1}[mode]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ids[name] > last_frozen or name.startswith("classifier."))
    encoder: Any = model.base_model
    depths = depths_of(encoder.config)
    for name, module in encoder.named_modules():
        # Dropping the path of a frozen block would only add noise to the input of the blocks that train.
        if hasattr(module, "drop_prob") and layer_id(f"{name}.", depths) <= last_frozen:
            module.drop_prob = 0.0


def balanced_weights(labels: np.ndarray) -> torch.Tensor:
    """Return weights (K,) that balance the classes, with a mean of 1 over the images."""
    counts = np.bincount(labels)
    return torch.tensor(len(labels) / (len(counts) * counts), dtype=torch.float32)


class FinetuneTrainer(MimTrainer):
    """`MimTrainer` for a native classifier and batches of uint8 `pixel_values` and `labels`.

    The loss is a mean over the images: some native classes sum it over accumulation steps or processes.

    Args:
        mixing: Augmentation of training batches; evaluation uses plain images and labels.
        image_mean, image_std: Mean and standard deviation of each channel, in [0, 1].
        class_weights: (K,), the weight of each class in the training loss.
    """

    model: Any

    def __init__(
        self,
        *args: Any,
        mixing: Mixing,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        class_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.mixing = mixing
        device = self.args.device
        self.image_mean, self.image_std = (
            torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in (image_mean, image_std)
        )
        self.class_weights = None if class_weights is None else class_weights.to(device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels: torch.Tensor = inputs["labels"]  # (B,)
        pixel_values = (inputs["pixel_values"] - self.image_mean) / self.image_std
        targets, weights = labels, None
        if model.training:
            counters = (self.state.global_step, self._micro_step, self.args.process_index)
            pixel_values, targets = self.mixing(pixel_values, labels, *counters)  # (B, K)
            weights = self.class_weights
        outputs = model(pixel_values=pixel_values)
        loss = nn.functional.cross_entropy(outputs.logits.float(), targets, weight=weights)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self.get_eval_dataloader(test_dataset)  # `Trainer` would drop the last, smaller batch

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        is_swin = self.model.config.model_type == "swin"
        exempt = (*_NO_WEIGHT_DECAY, *(_NO_WEIGHT_DECAY_IN_SWIN if is_swin else ()))
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(exempt)]

    def _has_finite_loss(self, item: dict[str, Any]) -> bool:
        batch = self._prepare_inputs(self.data_collator([item]))
        with torch.no_grad(), self.compute_loss_context_manager():
            return bool(torch.isfinite(self.compute_loss(self.model, batch)))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # By default native models are saved with the key names of transformers 4, which `Trainer` then loads with
        # strict=False: resuming, or loading the best weights, would silently lose every transformer block.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del self.model.save_pretrained
