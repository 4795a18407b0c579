"""Fine-tuning gives one result however a step is divided, and its checkpoints hold every weight."""

import os

import pytest
import torch
from conftest import ROOT
from forked import run_forked
from safetensors.torch import load_file
from torch.testing import assert_close
from train_classifiers import ENCODERS, NUM_CLASSES, few_clothes, tiny_classifier, tiny_finetune_trainer

from data.augmentations import single_view
from data.classification import eval_view
from data.collators import stack_items
from data.images import ImageDataset
from training.finetune_trainer import freeze
from training.mixing import Mixing

SGD = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("kind", ENCODERS)
def test_accumulation__of_four_by_two_equals_one_by_eight(kind, tmp_path):
    """Stock BeitForImageClassification under the stock Trainer has four times the gradient."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        arguments = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, **SGD}
        trainer = tiny_finetune_trainer(kind, tmp_path / str(batch_size), **arguments)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((trainer.model.state_dict(), losses))
    (one, losses), (four, others) = runs
    for name, expected in one.items():
        assert_close(four[name], expected, rtol=1e-4, atol=1e-6)
    assert others == pytest.approx(losses, rel=1e-4)


def test_two_processes__equal_one_with_the_same_global_batch(tmp_path):
    """DDP averages in another order than one process sums, hence the tolerance."""
    script = ROOT / "tests" / "train_classifiers.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for num_processes, name in ((None, "one"), (2, "two")):
        done = run_forked([script, tmp_path / name], environment, num_processes=num_processes)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ENCODERS:
        one, two = (torch.load(tmp_path / name / f"{kind}.pt", weights_only=True) for name in ("one", "two"))
        assert two["world_size"] == 2
        for name, expected in one["weights"].items():
            assert_close(two["weights"][name], expected, rtol=1e-4, atol=1e-6)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_checkpoint__has_the_names_that_the_model_has(kind, tmp_path):
    trainer = tiny_finetune_trainer(kind, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(saved[name], parameter), name


def test_rates__are_decayed_by_layer_and_tokens_positions_and_norms_are_not_decayed_in_weight(tmp_path):
    trainer = tiny_finetune_trainer("vit", tmp_path, layer_decay=0.5, learning_rate=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    assert found["classifier.weight"] == (0.1, 0.05)
    assert found["beit.pooler.layernorm.weight"] == (0.1, 0.0)
    assert found["beit.layers.1.mlp.fc1.weight"] == (0.05, 0.05)
    assert found["beit.layers.0.mlp.fc1.bias"] == (0.025, 0.0)
    for token in ("cls_token", "position_embeddings"):
        assert found[f"beit.embeddings.{token}"] == (0.0125, 0.0)
    assert found["beit.embeddings.patch_embeddings.projection.weight"] == (0.0125, 0.05)


def test_tables__are_decayed_in_beit_and_not_in_swin(tmp_path):
    for kind, is_decayed in (("beit", True), ("swin", False)):
        trainer = tiny_finetune_trainer(kind, tmp_path / kind)
        decayed = trainer.get_decay_parameter_names(trainer.model)
        assert any(name.endswith("relative_position_bias_table") for name in decayed) is is_decayed


def test_mixing__happens_in_training_only_and_the_same_after_a_resume(tmp_path):
    trainer = tiny_finetune_trainer("vit", tmp_path, mixing=Mixing(NUM_CLASSES))
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    images = ImageDataset(few_clothes(), single_view(eval_view((32, 32), 1.0), 3))
    batch = stack_items([images[index] for index in range(8)])
    plain = (batch["pixel_values"] / 255 - 0.5) / 0.5
    trainer.model.eval()
    trainer.compute_loss(trainer.model, dict(batch))
    assert_close(seen[-1], plain)
    trainer.model.train()
    for step in (0, 1, 0):
        trainer.state.global_step = step
        trainer.compute_loss(trainer.model, dict(batch))
    assert not torch.allclose(seen[1], plain, atol=0.01)
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], seen[3])


@pytest.mark.parametrize(
    ("mode", "num_blocks", "trained"),
    [
        ("finetune", 4, {"embeddings", "layers.0", "layers.1", "pooler", "classifier"}),
        ("partial", 1, {"layers.1", "pooler", "classifier"}),
        ("linear", 4, {"classifier"}),
    ],
)
def test_freeze__leaves_the_rest_out_and_drops_paths_only_where_something_trains(mode, num_blocks, trained):
    classifier = tiny_classifier("vit", drop_path_rate=0.2)
    freeze(classifier, mode, num_blocks)
    parts = {name.removeprefix("beit.") for name, p in classifier.named_parameters() if p.requires_grad}
    assert {part for part in trained if any(name.startswith(part) for name in parts)} == trained
    assert all(name.startswith(tuple(trained)) for name in parts)
    rate = classifier.beit.layers[1].drop_path.drop_prob
    assert rate == (0.2 if "layers.1" in trained else 0.0)


def test_freeze__more_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_trained_blocks is 3, but this encoder has 2 blocks"):
        freeze(tiny_classifier("vit"), "partial", 3)


def test_swin__blocks_of_all_stages_count():
    classifier = tiny_classifier("swin")
    freeze(classifier, "partial", 2)
    trained = {name.split(".blocks")[0] for name, p in classifier.named_parameters() if p.requires_grad}
    assert trained == {
        "swin.encoder.layers.1",
        "swin.layernorm.weight",
        "swin.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    }
