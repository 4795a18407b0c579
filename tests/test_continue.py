"""Continuing a trained encoder: heads first, then all, close to where it began."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZE, tiny_arguments, tiny_batch, tiny_collator, tiny_images, tiny_model, train_whole_and_resumed
from pretraining_command import pretrain
from torch.testing import assert_close
from transformers import AutoModel, TrainerCallback, ViTConfig, ViTModel

from modeling import MODELS
from modeling.frozen_teacher import FrozenTeacher
from modeling.self_distillation import gram_loss
from training.targets import AnchorTargets
from training.trainer import MimTrainer

NUM_HEAD_STEPS = (
    6  # of 8: the run is interrupted in step 5 and continues from step 4, and with 3 from after the switch
)
PHOTOGRAPHS = Path(__file__).parent.parent / "data" / "samples" / "photographs" / "train"


class Snapshots(TrainerCallback):
    """The weights before the first step and after each."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()})


def trainer_of(variant: str, folder: Path, callbacks: list[TrainerCallback], num_head_steps: int) -> MimTrainer:
    return MimTrainer(
        model=tiny_model(variant),
        args=tiny_arguments(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=4,
            warmup_steps=2,
            max_grad_norm=1.0,
        ),
        train_dataset=tiny_images(variant=variant, images_per_step=8),
        data_collator=tiny_collator(variant, with_image_index=True),
        num_head_steps=num_head_steps,
        layer_decay=0.75,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("variant", ["dinov2", "mae"])
def test_head_warmup__trains_heads_first_and_then_all(variant, tmp_path):
    snapshots = Snapshots()
    trainer = trainer_of(variant, tmp_path, [snapshots], NUM_HEAD_STEPS)
    trainer.train()
    first, *_, last = snapshots.states
    switch = snapshots.states[NUM_HEAD_STEPS]
    names = {name for name in first if name.startswith("encoder.") and not name.endswith("mask_token")}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(switch[name], first[name]) for name in names)
    teacher = [name for name in first if name.startswith("teacher.") and not name.endswith("mask_token")]
    assert all(torch.equal(switch[name], first[name]) for name in teacher)
    heads = {name for name in trained - names if not name.endswith(("prototypes", "mask_token", "k_proj.bias"))}
    assert heads
    assert [name for name in heads if torch.equal(switch[name], first[name])] == []
    moved = {name for name in trained & names if not torch.equal(last[name], switch[name])}
    assert {name for name in trained & names if "layer" in name and "k_proj.bias" not in name} <= moved
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[1:NUM_HEAD_STEPS] == [1e-3] * (NUM_HEAD_STEPS - 1)
    assert rates[NUM_HEAD_STEPS:] == [0.0, 0.0005]  # it rises anew


@pytest.mark.parametrize(("variant", "num_head_steps"), [("dinov2", NUM_HEAD_STEPS), ("mae", 3)])
def test_head_warmup__resumed_before_and_after_the_switch_is_bitwise(variant, num_head_steps, tmp_path):
    def make_trainer(folder: Path, callbacks: list[TrainerCallback]) -> MimTrainer:
        return trainer_of(variant, folder, callbacks, num_head_steps)

    whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name


# ---- Gram matrices ----


def test_gram_loss__compares_cosines_between_patches_within_each_crop():
    torch.manual_seed(0)
    student, anchor = torch.randn(3, 5, 8), torch.randn(3, 5, 6)  # widths may differ
    errors = [
        (torch.cosine_similarity(s[i], s[j], dim=0) - torch.cosine_similarity(a[i], a[j], dim=0)) ** 2
        for s, a in zip(student, anchor, strict=True)
        for i in range(5)
        for j in range(5)
    ]
    assert_close(gram_loss(student, anchor), torch.stack(errors).mean())
    assert_close(gram_loss(3 * student, student), torch.zeros(()))


def test_gram__compares_the_student_with_the_anchor_and_reaches_the_encoder():
    model, batch = tiny_model("dino"), tiny_batch("dino")
    model.config.gram_weight = 2.0
    stats = model.config.image_mean, model.config.image_std
    batch = AnchorTargets(FrozenTeacher(tiny_model("dino").teacher, *stats, SIZE))(batch)
    assert batch["anchor_features"].shape == (16, 16, 32)  # 2 crops of 8 images
    same = model(**batch)
    assert same.losses["gram"] < 1e-10  # nothing has changed yet
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc2.weight.add_(torch.randn_like(model.encoder.layers[1].mlp.fc2.weight))
    output = model(**batch)
    without = model(**{name: value for name, value in batch.items() if name != "anchor_features"})
    assert "gram" not in without.losses
    assert_close(output.loss - without.loss, 2 * output.losses["gram"])
    (gradient,) = torch.autograd.grad(output.losses["gram"], model.encoder.layers[0].mlp.fc1.weight)
    assert gradient.any()


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    ViTModel(ViTConfig(**sizes, image_size=48, patch_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for photograph in sorted(PHOTOGRAPHS.glob("*.jpg"))[:8]:
        shutil.copy(photograph, folder)
    return folder


def run(source: Path, out: Path, images: Path, *flags: str, method: str = "dino") -> int:
    heads = ["--num_prototypes", "24", "--head_hidden_size", "16", "--head_bottleneck_size", "16"]
    own = [*heads, "--num_local_crops", "2"] if method == "dino" else []
    return pretrain(
        [
            *("--init_from", str(source), "--method", method, "--dataset", str(images), "--output_dir", str(out)),
            *("--image_size", "32", "--per_device_train_batch_size", "4", "--max_steps", "5", "--save_steps", "2"),
            *("--validation_fraction", "0", "--use_cpu", *own, *flags),
        ]
    )


def test_run__close_to_its_source_continues_without_it_and_exports_no_anchor(vit, photographs, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(vit, source)
    flags = ["--gram_weight", "2", "--head_warmup_epochs", "1", "--layer_decay", "0.9", "--learning_rate", "1e-3"]
    assert run(source, out, photographs, *flags) == 0
    said = capsys.readouterr().out
    assert "for 2 steps of new parts on the encoder as it is, then anew of all, times 0.9 from layer to layer" in said
    whole = MODELS["dino"].from_pretrained(out / "pretraining").state_dict()
    assert not any("anchor" in name for name in whole)
    kept, expected = (AutoModel.from_pretrained(folder).state_dict() for folder in (out / "gram_anchor", source))
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    begun = MODELS["dino"].from_pretrained(out / "checkpoint-2").state_dict()  # still the source's
    assert torch.equal(begun["encoder.layers.1.mlp.fc1.weight"], expected["layers.1.mlp.fc1.weight"])
    for folder in (out / "pretraining", out / "checkpoint-5", out / "checkpoint-4", source):
        shutil.rmtree(folder)
    assert run(source, out, photographs, *flags) == 0
    assert "continuing from" in capsys.readouterr().out
    again = MODELS["dino"].from_pretrained(out / "pretraining").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("loss" in entry for entry in history)


def test_mistakes__each_get_one_clear_message(vit, photographs, tmp_path, capsys):
    def refusal(*flags: str, method: str = "dino") -> str:
        assert run(vit, tmp_path / "out", photographs, *flags, method=method) == 2
        return capsys.readouterr().err

    assert "is 6 steps, but the whole training has 5" in refusal("--head_warmup_epochs", "3")
    assert "gram_weight is a setting of dino, dinov2, ibot, not of mae" in refusal("--gram_weight", "1", method="mae")
    for flags in (["--gram_weight", "1"], ["--head_warmup_epochs", "1"]):
        scratch = ["--dataset", str(photographs), "--output_dir", str(tmp_path / "out"), "--method", "dino"]
        assert pretrain(["--model", "vit-nano", *scratch, *flags]) == 2
        assert "--init_from" in capsys.readouterr().err
