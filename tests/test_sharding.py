"""FSDP2 on two processes of the CPU: the weights of DDP, checkpoints for both, whole exports, and the guard."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import ROOT, VARIANTS, model_class, tiny_model
from forked import run_forked
from torch.testing import assert_close
from train_sharded import MAX_GRAD_NORM, RUNS

from training.sharding import set_up_plugin

SCRIPT = ROOT / "tests" / "train_sharded.py"
SOME = [variant for variant in ("mae", "data2vec") if variant in VARIANTS]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SOME, id="some"),
        pytest.param([name for name in VARIANTS if name not in SOME], id="others", marks=pytest.mark.slow),
    ],
)
def trained(request, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("sharded")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = run_forked([SCRIPT, folder, *request.param], environment, num_processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, request.param


def test_fsdp2__trains_as_ddp_does_and_each_continues_the_other(trained):
    """With clipping, a teacher or frozen tables, and an average; sums in another order, hence the tolerance."""
    folder, variants = trained
    for variant in variants:
        ddp, *others = (torch.load(folder / variant / f"{run}.pt", weights_only=True) for run in RUNS)
        assert max(ddp["grad_norm"]) > MAX_GRAD_NORM  # else nothing was clipped
        for run, other in zip(RUNS[1:], others, strict=True):
            for kind in ("weights", "average"):
                for name, expected in ddp[kind].items():
                    atol = 1e-4 if name.endswith("queue.features") else 1e-5
                    label = f"{variant} {run} {kind} {name}"
                    assert_close(
                        other[kind][name], expected, rtol=1e-3, atol=atol, msg=lambda text, at=label: f"{at}: {text}"
                    )
            # Distances between nearly equal features magnify the last digits of weights.
            rel = 1e-2 if tiny_model(variant).compares_images else 1e-3
            for key in ("loss", "grad_norm", "eval_loss"):
                assert other[key] == pytest.approx(ddp[key], rel=rel), f"{variant} {run} {key}"


def test_fsdp2__exports_whole_weights(trained):
    folder, variants = trained
    for variant in variants:
        expected = torch.load(folder / variant / "fsdp.pt", weights_only=True)["weights"]
        exported = model_class(variant).from_pretrained(folder / variant / "fsdp" / "exported")
        for name, value in exported.state_dict().items():
            assert torch.equal(value, expected[name]), f"{variant} {name}"


def test_fsdp2__stops_everywhere_at_a_loss_that_is_not_finite_and_keeps_the_weights(trained):
    folder, _ = trained
    for rank in (0, 1):
        assert "became NaN or infinite at step 3" in (folder / f"nan-{rank}.txt").read_text()
    assert all(torch.isfinite(value).all() for value in torch.load(folder / "nan.pt", weights_only=True).values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fsdp_version", 1, "expected 2"),
        ("activation_checkpointing", True, "gradients are wrong: turn it off, and set gradient_checkpointing"),
        ("cpu_ram_efficient_loading", True, "tables of positions"),
    ],
)
def test_plugin__with_a_setting_that_would_change_results_is_refused(name, value, message):
    settings = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False}
    with pytest.raises(ValueError, match=message):
        set_up_plugin(SimpleNamespace(**settings | {name: value}), tiny_model("mae"))


def test_embeddings__are_no_unit_of_their_own(variant):
    """MAE uses their weights outside of their forward pass, where a unit of its own would be sharded."""
    assert tiny_model(variant).get_input_embeddings() is None


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipe__of_accelerate_loads_and_makes_a_plugin_that_is_accepted(file, monkeypatch):
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    assert str(config.distributed_type).endswith({"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(file.stem, "DEEPSPEED"))
    if file.stem == "fsdp2":
        for name, value in config.fsdp_config.items():
            monkeypatch.setenv(name.upper(), str(value))
        plugin = FullyShardedDataParallelPlugin()
        set_up_plugin(plugin, tiny_model("mae"))
        assert plugin.transformer_cls_names_to_wrap == ["ViTLayer"]
