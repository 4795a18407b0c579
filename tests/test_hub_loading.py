"""Every method on the Hub, as `hubstub` plays it, loaded from there by a process without this project."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_MODELS, tiny_batch, tiny_model, write_card
from hubstub import HubStub, connect

from hub.export.native import export
from hub.push import Repository

WITHOUT_CLASSIFIER = {"dinov3_vit"}  # in transformers

LOAD = r"""
import json, re, sys
from pathlib import Path
import torch
import transformers
from huggingface_hub import hf_hub_download
from transformers import AutoModel, AutoModelForPreTraining

assert not any(name in sys.modules for name in ("modeling", "hub", "training"))
results = {}
for variant in sys.argv[1:]:
    repo_id = f"ann/{variant}".replace("+", "-")
    refusals = []
    for load, arguments in (
        (AutoModelForPreTraining, {"subfolder": "pretraining"}),
        (AutoModelForPreTraining, {"subfolder": "pretraining", "trust_remote_code": False}),
        (AutoModel, {"token": False}),
    ):
        try:
            load.from_pretrained(repo_id, **arguments)
            refusals.append("")
        except (ValueError, OSError) as error:
            refusals.append(str(error))
    AutoModel.from_pretrained(repo_id)
    executed_without_the_flag = Path("executed").exists()
    card = Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8")
    if transformers.__version__.startswith("5.17."):  # its AutoImageProcessor needs torchvision
        card = card.replace("AutoImageProcessor", "ViTImageProcessorPil")
    scopes = []
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        scopes.append({})
        exec(compile(block, "README.md", "exec"), scopes[-1])
    made = {name: value for scope in scopes for name, value in scope.items()}
    results[variant] = {
        "refusals": refusals,
        "executed_without_the_flag": executed_without_the_flag,
        "features": list(made["features"].shape),
        "num_classes": made["classifier"].config.num_labels if "classifier" in made else None,
        "loss": made["model"](**torch.load(f"{variant}.batch", weights_only=True)).loss.item(),
        "executed_with_the_flag": Path("executed").exists(),
    }
    Path("executed").unlink(missing_ok=True)
print()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Every head on the Hub, loaded from there by the snippets of its card, in a process without this project."""
    folder = tmp_path_factory.mktemp("exported")
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # where no folder has the name of a repository
    losses = {}
    with HubStub() as stub, pytest.MonkeyPatch.context() as patch:
        connect(patch, stub, folder)
        for variant in TINY_MODELS:
            repo_id, head = f"ann/{variant}".replace("+", "-"), tiny_model(variant).eval()
            exported = folder / repo_id
            export(head, exported, method=variant, recipe={})
            write_card(
                exported,
                num_extra_tokens=int(hasattr(head.encoder.embeddings, "cls_token")),
                has_classifier=head.encoder.config.model_type not in WITHOUT_CLASSIFIER,
            )
            Repository(repo_id, private=True).push(exported, "first")
            files = stub.repos[repo_id].files
            for name in [name for name in files if name.endswith(".py")]:
                files[name] = b"open('executed', 'w').close()\n" + files[name]
            torch.save(tiny_batch(variant), elsewhere / f"{variant}.batch")
            losses[variant] = head(**tiny_batch(variant)).loss.item()
        shutil.copy(next((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg")), elsewhere / "photo.jpg")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= stub.environment(str(folder / "home"))
        command = [sys.executable, "-c", LOAD, *TINY_MODELS]
        result = subprocess.run(
            command,
            cwd=elsewhere,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    return losses, json.loads(result.stdout.splitlines()[-1])


def test_hub__the_three_snippets_of_a_card_work_for_every_method(loaded_elsewhere, variant):
    losses, found = loaded_elsewhere
    assert found[variant]["features"] == [1, 32]
    has_classifier = tiny_model(variant).encoder.config.model_type not in WITHOUT_CLASSIFIER
    assert found[variant]["num_classes"] == (10 if has_classifier else None)
    assert found[variant]["loss"] == pytest.approx(losses[variant], abs=1e-6)


def test_hub__no_code_of_a_repository_is_run_without_the_flag(loaded_elsewhere, variant):
    _, found = loaded_elsewhere
    assert not found[variant]["executed_without_the_flag"]
    assert found[variant]["executed_with_the_flag"]
    for refusal in found[variant]["refusals"][:2]:
        assert "trust_remote_code=True" in refusal


def test_hub__a_private_repository_opens_with_the_token_only(loaded_elsewhere, variant):
    refusal = loaded_elsewhere[1][variant]["refusals"][2]
    assert "private" in refusal or "token" in refusal
