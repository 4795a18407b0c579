"""data2vec 2.0: targets, decoder and loss against a NumPy reference, and one pass of the teacher for all masks."""

import math

import numpy as np
import pytest
import torch
from conftest import PATCH, SIZE, tiny_batch, tiny_config, tiny_images, tiny_model
from torch.testing import assert_close

from data.collators import MaskingCollator
from modeling.data2vec2 import Data2Vec2Config, Data2Vec2ForPreTraining

GRID = (SIZE // PATCH, SIZE // PATCH)


def batch_of(num_masks: int | None = None, num_images: int = 4, ratio: float = 1.0) -> dict:
    images = tiny_images(variant="data2vec2")
    collator = MaskingCollator(GRID, 0.75, "visible-blocks", num_masks=num_masks, prediction_ratio=ratio)
    return collator([images[index] for index in range(num_images)])


def shifted_model(**settings) -> Data2Vec2ForPreTraining:
    """A model in which no weight has the value it starts with, and the teacher is not the student."""
    torch.manual_seed(0)
    config = tiny_config("data2vec2").to_diff_dict() | settings
    model = Data2Vec2ForPreTraining(Data2Vec2Config(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@torch.no_grad()
def reference_targets(model: Data2Vec2ForPreTraining, pixels: torch.Tensor) -> np.ndarray:
    """(B, N, D), from transformers' own forward pass of the teacher."""
    outputs: list[np.ndarray] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, output: outputs.append(output[:, 1:].double().numpy()))
        for layer in model.teacher.layers
    ]
    model.teacher(pixels)
    for hook in hooks:
        hook.remove()
    chosen = np.stack(outputs[-model.config.num_target_layers :])  # (layers, B, N, D)
    chosen = (chosen - chosen.mean(2, keepdims=True)) / np.sqrt(chosen.var(2, keepdims=True) + 1e-5)
    mean = chosen.mean(0)
    return (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)


@torch.no_grad()
def reference_decoder(model: Data2Vec2ForPreTraining, features: torch.Tensor, visible: torch.Tensor) -> np.ndarray:
    """(R, V, D) -> (R, N, D), patch by patch and group by group."""
    h, w = GRID
    maps = np.zeros((len(features), h, w, features.shape[-1]))
    for image, (rows, indices) in enumerate(zip(features.double().numpy(), visible.tolist(), strict=True)):
        for row, index in zip(rows, indices, strict=True):
            maps[image, index // w, index % w] = row
    for block in model.decoder_blocks:
        weight, bias = block.conv.weight.double().numpy(), block.conv.bias.double().numpy()  # (E, D / groups, 3, 3)
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = np.zeros((*maps.shape[:3], len(bias)))
        size_in, size_out = weight.shape[1], len(bias) // block.conv.groups
        for group in range(block.conv.groups):
            ins = slice(group * size_in, (group + 1) * size_in)
            outs = slice(group * size_out, (group + 1) * size_out)
            for row in range(3):
                for column in range(3):
                    window = padded[:, row : row + h, column : column + w, ins]
                    out[..., outs] += window @ weight[outs, :, row, column].T
        out += bias
        out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
        out = torch.nn.functional.gelu(torch.from_numpy(out)).numpy()
        maps = out + maps if out.shape == maps.shape else out
    weight, bias = (tensor.double().numpy() for tensor in model.decoder_pred.parameters())
    return maps.reshape(len(maps), h * w, -1) @ weight.T + bias


@torch.no_grad()
@pytest.mark.parametrize("channels", [0, 16])
def test_step__equals_the_reference(channels):
    """Targets, predictions and loss, for a decoder as wide as the encoder and for a narrower one."""
    model, batch = shifted_model(decoder_channels=channels, num_target_layers=2), batch_of(num_masks=2)
    pixels, masks = model.standardize(batch["pixel_values"]), batch["bool_masked_pos"].flatten(0, 1)
    targets = reference_targets(model, pixels)
    visible = torch.stack([(~mask).nonzero().squeeze(1) for mask in masks])
    # The encoder on visible patches is MAE's, which has its own tests.
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1).reshape(4, 16, -1)
    seen = torch.stack([patches[number // 2][indices] for number, indices in enumerate(visible)])
    features = model.encoder.encode(seen, visible, GRID)[-1]
    predictions = reference_decoder(model, features[:, 1:], visible)
    errors, class_errors = [], []
    for number, mask in enumerate(masks.numpy()):
        target = targets[number // 2]
        errors += [*np.square(predictions[number][mask] - target[mask]).sum(-1)]
        class_errors.append(np.square(features[number, 0].numpy() - target.mean(0)).sum())
    expected = (np.mean(errors) + 2.56 * np.mean(class_errors)) / math.sqrt(32)
    output = model(**batch)
    assert_close(
        output.logits, torch.from_numpy(predictions[masks.numpy()].reshape(8, 12, 32)).float(), atol=1e-5, rtol=1e-4
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert model.loss_counts(batch) == {"patch": 8 * 12, "class": 8}


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_several_masks__cost_one_pass_of_the_teacher_and_give_the_mean_over_single_masks(ratio, monkeypatch):
    model, batch = shifted_model(), batch_of(num_masks=3, ratio=ratio)
    passes = []
    model.teacher.layers[0].register_forward_hook(lambda *args: passes.append("whole block"))
    model.teacher.layers[0].mlp.register_forward_hook(lambda module, args, output: passes.append(tuple(output.shape)))
    together = model(**batch)
    assert passes == [(4, 1 + 16, 32)]
    names = [name for name in batch if name.startswith("bool")]
    alone = [model(batch["pixel_values"], **{name: batch[name][:, number] for name in names}) for number in range(3)]
    assert_close(together.loss, torch.stack([output.loss for output in alone]).mean())
    assert_close(together.logits.unflatten(0, (4, 3)), torch.stack([output.logits for output in alone], 1))


@torch.no_grad()
def test_log__has_the_std_of_the_predictions_and_the_features_of_a_collapsed_encoder_are_a_sign():
    model = shifted_model()
    output = model(**batch_of(num_masks=2))
    metrics = model.summarize_metrics(output.metrics)
    std = output.logits.flatten(0, 1).std(0, correction=0).mean().item()
    assert metrics == {"prediction_std": pytest.approx(std, rel=1e-4)}
    assert model.describe_metrics(metrics) == [f"prediction std {std:.3f}"]
    assert model.collapse_signs({**metrics, "feature_std": 0.7, "rankme": 9.0}) is None
    assert "nearly equal" in model.collapse_signs({**metrics, "feature_std": 0.01, "rankme": 1.5})


def test_gradient__reaches_the_student_only():
    model = shifted_model().train()
    model(**batch_of(num_masks=2)).loss.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_class_loss__is_left_out_with_weight_zero():
    model, batch = shifted_model(class_loss_weight=0.0), batch_of()
    output = model(**batch)
    assert list(output.losses) == list(model.loss_counts(batch)) == ["patch"]
    assert torch.equal(output.loss, output.losses["patch"])


@torch.no_grad()
def test_masked_patches__are_noise_in_training_and_zero_in_evaluation():
    model, received = shifted_model(mask_noise_std=0.01), []
    model.decoder_blocks[0].register_forward_pre_hook(lambda module, args: received.append(args[0].flatten(1, 2)))
    batch = batch_of(num_images=8)
    for mode in (True, True, False):
        model.train(mode)(**batch)
    mask = batch["bool_masked_pos"]
    first, second, evaluated = (tokens[mask] for tokens in received)
    assert first.std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(first, second)
    assert not evaluated.any()
    assert torch.equal(received[0][~mask], received[2][~mask])


@torch.no_grad()
def test_teacher__keeps_float32_weights_under_autocast():
    model, batch = shifted_model(), batch_of()
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, exact.loss, rtol=0.05, atol=0)
    assert all(parameter.dtype == torch.float32 for parameter in model.teacher.parameters())


@torch.no_grad()
def test_other_size__equals_a_model_of_that_size():
    model, other = tiny_model("data2vec2").eval(), tiny_model("data2vec2", image_size=2 * SIZE).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "position_embeddings" not in name}
    other.load_state_dict(state, strict=False)
    images = torch.randint(0, 256, (2, 3, 2 * SIZE, 2 * SIZE), dtype=torch.uint8)
    mask = (torch.arange(64) % 4 > 0).expand(2, -1)
    assert torch.equal(model(images, mask).loss, other(images, mask).loss)


@pytest.mark.parametrize(("num_blocks", "num_targets"), [(1, 1), (4, 2), (12, 10), (24, 18), (32, 24)])
def test_config__has_the_authors_values_for_the_depth(num_blocks, num_targets):
    config = Data2Vec2Config(encoder_config={"num_hidden_layers": num_blocks})
    assert config.num_target_layers == num_targets
    assert (config.decoder_channels, config.decoder_num_convolutions) == (768, 6)
    assert (config.decoder_kernel_size, config.decoder_num_groups, config.mask_noise_std) == (3, 16, 0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"decoder_num_groups": 5}, r"decoder_num_groups is 5, expected a divisor of the encoder's width 768"),
        ({"decoder_channels": 100}, r"of decoder_channels 100"),
        ({"decoder_kernel_size": 2}, r"decoder_kernel_size is 2, expected an odd number"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5, expected 0 to 1"),
    ],
)
def test_config__refuses_what_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        Data2Vec2Config(**setting)


def test_compile__is_one_graph():
    model, batch = tiny_model("data2vec2").eval(), tiny_batch("data2vec2")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(**batch).loss, model(**batch).loss)
