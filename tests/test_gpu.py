"""What only a GPU can show: half precision, compilation, and that no step waits for the device.

`python -m pytest -m gpu tests/test_gpu.py`; GPU_TEST_DEVICE=cpu runs as much of it as a CPU can.
"""

import os
import re
import shutil

import pytest
import torch
from conftest import (
    PATCH,
    SIZE,
    tiny_arguments,
    tiny_batch,
    tiny_collator,
    tiny_images,
    tiny_model,
    tiny_tokenizer,
)
from pretraining_command import pretrain
from safetensors.torch import load_file
from transformers import TrainerCallback

from training.targets import TokenizerTargets
from training.trainer import MimTrainer

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU"),
]


def let_waiting_be(mode: str) -> None:
    if ON_GPU:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture(autouse=True)
def _waiting_is_allowed_again():
    yield
    let_waiting_be("default")


def on_device(batch: dict) -> dict:
    return {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}


def half_precision() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16)


def fused_adamw(model) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, fused=True)


def gpu_trainer(folder, variant="mae", callbacks=(), **changes) -> MimTrainer:
    """With the arguments that a run has on a GPU."""
    settings = {
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        "dataloader_pin_memory": ON_GPU,
        "accelerator_config": {"non_blocking": ON_GPU},
        "logging_steps": 100,
    }
    return MimTrainer(
        model=tiny_model(variant),
        args=tiny_arguments(folder, **{**settings, **changes}),
        train_dataset=tiny_images(variant=variant),
        data_collator=tiny_collator(variant, with_image_index=True),
        callbacks=list(callbacks),
    )


# ---- models ----


def test_step__in_half_precision_learns_what_float32_learns(variant):
    batch = tiny_batch(variant)
    in_float32 = tiny_model(variant).train()(**batch).loss.item()
    model, batch, losses = tiny_model(variant).to(DEVICE).train(), on_device(batch), []
    optimizer = fused_adamw(model)
    for _ in range(8):
        with half_precision():
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(in_float32, rel=0.02)
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_step__does_not_wait_for_the_device(variant):
    model, batch = tiny_model(variant).to(DEVICE).train(), on_device(tiny_batch(variant))
    optimizer = fused_adamw(model)

    def step() -> None:
        with half_precision():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes what is made once
    let_waiting_be("error")
    step()


def test_tokenizer__does_not_wait_for_the_device():
    targets = TokenizerTargets(tiny_tokenizer(), (SIZE // PATCH, SIZE // PATCH)).to(torch.device(DEVICE))
    batch = {targets.view.name: torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8, device=DEVICE)}
    targets(batch)
    let_waiting_be("error")
    assert targets(batch)["labels"].shape == (2, (SIZE // PATCH) ** 2)


# ---- trainer ----


class ForbidWaiting(TrainerCallback):
    """From the third step on until the last one, which logs."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            let_waiting_be("error")
        if state.global_step == state.max_steps - 1:
            let_waiting_be("default")


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer__does_not_wait_for_the_device_between_logs(variant, workers, tmp_path):
    trainer = gpu_trainer(tmp_path, variant, [ForbidWaiting()], max_steps=6, dataloader_num_workers=workers)
    trainer.train()
    assert trainer.state.global_step == 6


def test_trainer__batches_are_pinned_and_stay_uint8_until_the_model(tmp_path):
    loader = gpu_trainer(tmp_path).get_train_dataloader()
    pinned = next(iter(loader.base_dataloader))["pixel_values"]
    assert pinned.dtype == torch.uint8
    assert pinned.is_pinned() == ON_GPU
    moved = next(iter(loader))["pixel_values"]
    assert moved.dtype == torch.uint8
    assert moved.device.type == DEVICE


class RaiseFlag(TrainerCallback):
    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        if state.global_step == 2:
            self.guard.flag.fill_(1.0)


def test_trainer__the_fused_optimizer_skips_on_the_device_once_the_guard_is_raised(tmp_path):
    callback = RaiseFlag()
    trainer = gpu_trainer(tmp_path, callbacks=[callback], max_steps=5)
    callback.guard = trainer.guard
    trainer.stop_if_not_finite = lambda: None  # it would end the run at the log of the last step
    trainer.train()
    assert trainer.optimizer.param_groups[0]["fused"]
    before, at_flag, after = callback.weights[1], callback.weights[2], callback.weights[4]
    assert not torch.equal(before, at_flag)
    assert torch.equal(at_flag, after)


# ---- command ----


def test_command__an_interrupted_run_continues_from_its_checkpoint_and_ends_near_the_undisturbed_one(tmp_path, capsys):
    folder = tmp_path / "out"
    command = ["--model", "vit-nano", "--max_steps", "10", "--save_steps", "5", "--output_dir", str(folder)]
    command += ["--per_device_train_batch_size", "8", "--dataloader_num_workers", "2", "--report_to", "none"]
    command += [] if ON_GPU else ["--use_cpu"]
    assert pretrain(command) == 0
    plan = capsys.readouterr().out
    assert ("cuda, bfloat16" if ON_GPU else "cpu, float32") in plan
    whole = load_file(folder / "model.safetensors")
    for path in [folder / "checkpoint-10", folder / "pretraining"]:
        shutil.rmtree(path)
    (folder / "model.safetensors").unlink()
    assert pretrain(command) == 0
    assert f"continuing from {folder / 'checkpoint-5'}" in capsys.readouterr().out
    for name, weight in load_file(folder / "model.safetensors").items():  # sums of a GPU have no fixed order
        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="a CPU's memory is only estimated")
def test_command__auto_finds_a_batch_that_fits_beside_other_programs(tmp_path, capsys):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 4 * 2**30, dtype=torch.uint8, device=DEVICE)
    flags = ["--model", "vit-base", "--repeated_aug", "32", "--max_steps", "2", "--save_strategy", "no"]
    flags += ["--validation_fraction", "0", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert pretrain([*flags, "--per_device_train_batch_size", "auto"]) == 0
    del taken
    found = re.search(r"note: (\d+) images per device \(auto\): more might not fit into", capsys.readouterr().out)
    assert found is not None
    assert 8 <= int(found[1]) <= 64


# ---- compilation, last because it takes longest ----


def test_compile__is_one_graph_in_half_precision_with_the_same_loss_and_gradient(variant):
    torch._dynamo.reset()
    model, batch = tiny_model(variant).to(DEVICE).train(), on_device(tiny_batch(variant))

    def gradients(forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        with half_precision():
            loss = forward(**batch).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    # Triton's code is measured by benchmarks/train_step.py; this is about the graphs, and takes seconds.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (loss, found), (expected_loss, expected) = gradients(compiled), gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=0.01, atol=0.01)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 0.05 * largest, name
