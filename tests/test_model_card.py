"""The model card: valid metadata, pictures that are there, nothing about the machine it was made on."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers.pipelines import SUPPORTED_TASKS

from hub.model_card import shorten_command, shorten_paths, write_model_card

TOKEN = "hf_" + "aB3" * 12


def card_text(folder: Path, **changes) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "the panel.png").touch()
    (folder / "loss.png").touch()
    arguments = {
        "command": "python /home/ann/mim/run_pretraining.py --dataset '/home/ann/my pics' "
        f"--output_dir=/scratch/ann/run_1 --hub_token {TOKEN}",
        "method": "mae",
        "model_name": "mae_vit_tiny",
        "recipe": {
            "dataset": ["/home/ann/my pics", "/data/more"],
            "learning_rate": 1.5e-4,
            "norm_pix_loss": True,
            "resume_from": None,
            "scheduler": {"cache": "~/cache/x"},
            "notes": "a|b <script> *c*",
        },
        "data_summary": {"images": 1200, "held out": 60, "bad files": 2, "source": r"C:\Users\ann\pics"},
        "metrics": {"train_loss": 0.43219, "eval_loss": 0.45},
        "versions": {"torch": "2.13.0", "hardware": "1x NVIDIA H100"},
        "panel": "pictures/the panel.png",
        "curve": "loss.png",
    }
    write_model_card(folder, **{**arguments, **changes})
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("base_model", [None, "facebook/vit-mae-base"])
def test_card__has_metadata_the_hub_accepts(tmp_path, base_model):
    card_text(tmp_path, base_model=base_model)
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag in SUPPORTED_TASKS
    assert data.license is None  # whose weights they are decides, not we
    assert {"masked-image-modeling", "mae"} <= set(data.tags)
    assert data.base_model == base_model


def test_card__names_no_path_or_token_of_the_machine(tmp_path):
    text = card_text(tmp_path, base_model="/home/ann/old/encoder")
    for secret in ("/home", "/scratch", "/data", "~/", "Users", "ann/", TOKEN):
        assert secret not in text
    assert "python run_pretraining.py --dataset 'my pics' --output_dir=run_1 --hub_token hf_..." in text
    assert "`encoder`" in text
    assert "base_model:" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/ann/my pics/a b", "a b"),
        ("/home/ann/pics/", "pics/"),
        ("--config=/home/ann/x.yaml", "--config=x.yaml"),
        ("parquet:/home/ann/x.parquet", "parquet:x.parquet"),
        ("file:///home/ann/x", "x"),
        ("//home//ann/x", "x"),
        ("~ann/x/y", "y"),
        (r"C:\Users\ann\pics", "pics"),
        ("/a/b,/c/d", "b,d"),
        ("['/a/b', '/c/d']", "['b', 'd']"),
        ("from /a/b (2 bad)", "from b (2 bad)"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
        ("user/name", "user/name"),
        ("recipes/mae.yaml", "recipes/mae.yaml"),
        ("../x/y", "../x/y"),
        ("images / second", "images / second"),
    ],
)
def test_shorten_paths__keeps_the_last_component_of_absolute_paths_only(text, expected):
    assert shorten_paths(text) == expected


def test_shorten_command__survives_an_unpaired_quote():
    assert "/home" not in shorten_command("python /home/ann/run.py --note it's")


def test_card__table_cells_cannot_break_the_table(tmp_path):
    text = card_text(tmp_path)
    (row,) = re.findall(r"^\| `notes` .*$", text, flags=re.MULTILINE)
    assert row == r"| `notes` | a\|b \<script\> \*c\* |"
    assert "| `learning_rate` | 0.00015 |" in text
    assert "| `norm_pix_loss` | true |" in text
    assert "| `scheduler.cache` | x |" in text


def test_card__every_table_is_well_formed(tmp_path):
    lines = card_text(tmp_path).splitlines()
    rules = [index for index, line in enumerate(lines) if line == "|---|---|"]
    assert len(rules) == 4
    for index in rules:
        assert lines[index - 2] == ""  # a table that follows text without an empty line is not a table
        assert lines[index + 1].startswith("| ")
        assert lines[index + 1].endswith(" |")


def test_card__embeds_pictures_by_relative_address(tmp_path):
    text = card_text(tmp_path)
    assert "](pictures/the%20panel.png)" in text
    assert "](loss.png)" in text
    assert "![" not in card_text(tmp_path, panel=None, curve=None)


@pytest.mark.parametrize("panel", ["missing.png", "/elsewhere/panel.png"])
def test_card__refuses_a_picture_outside_its_folder(tmp_path, panel):
    with pytest.raises(ValueError, match="relative to the card's folder"):
        card_text(tmp_path, panel=panel)


def test_card__says_that_quality_is_not_measured_unless_it_is(tmp_path):
    warning = "The quality of the features has not been measured."
    assert warning in card_text(tmp_path)
    measured = card_text(tmp_path, metrics={"eval_loss": 0.45, "knn_accuracy": 0.61})
    assert warning not in measured
    assert "0.61" in measured


@pytest.mark.parametrize(
    ("method", "arxiv"), [("mae", "2111.06377"), ("simmim", "2111.09886"), ("beit", "2106.08254")]
)
def test_card__cites_the_method(tmp_path, method, arxiv):
    text = card_text(tmp_path, method=method)
    assert f"journal = {{arXiv preprint arXiv:{arxiv}}}" in text
    bibtex = text.split("```bibtex\n")[1].split("```")[0]
    assert bibtex.count("{") == bibtex.count("}")


def test_card__of_an_unknown_method_has_no_citation(tmp_path):
    assert "bibtex" not in card_text(tmp_path, method="my-own")


def test_card__code_blocks_are_valid_python(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", card_text(tmp_path), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "README.md", "exec")


def test_card__tells_how_to_use_an_encoder_without_a_class_token_or_without_a_native_form(tmp_path):
    assert "last_hidden_state[:, 1:].mean(1)" in card_text(tmp_path)
    swin = card_text(tmp_path, has_class_token=False)
    assert "last_hidden_state.mean(1)" in swin
    assert "[:, 1:]" not in swin
    assert "there is no class token" in swin
    alone = card_text(tmp_path, native_root_problem="a window of 12 is too large")
    assert "a window of 12 is too large" in alone
    assert "AutoModel.from_pretrained" not in alone
    assert 'subfolder="pretraining"' in alone
