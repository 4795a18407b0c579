"""The model card: valid metadata, pictures that are there, nothing about the machine it was made on."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import tiny_model
from huggingface_hub import ModelCard
from transformers.pipelines import SUPPORTED_TASKS

from commands.artifacts import num_extra_tokens
from hub.card_rules import check_card
from hub.model_card import card_for, write_model_card
from hub.redaction import shorten_command, shorten_paths
from tasks.classification import classification_card

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


HOSTILE = """<img src=x onerror=alert(1)>
# Owned
```
[here](javascript:x) `| <b>"""


def test_card__shows_what_the_user_named_and_never_interprets_it(tmp_path):
    entry = {"name": HOSTILE, "metric": HOSTILE, "value": 0.5, "interval": None, "n": 3}
    (tmp_path / "metrics.json").write_text(json.dumps({"results": [entry], "dataset": HOSTILE}))
    text = card_text(
        tmp_path,
        model_name=HOSTILE,
        base_model=HOSTILE,
        command=shlex.join(["python", "run_finetune.py", "--output_dir", HOSTILE]),
        recipe={"dataset": [HOSTILE]},
        data_summary={HOSTILE: HOSTILE},
        task=classification_card(("cat", HOSTILE)),
    )
    body = text.split("---\n", 2)[2]
    lines = body.splitlines()
    outside = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"(?<!\\)`[^`\n]*(?<!\\)`", "", outside)  # code spans
    assert not re.search(r"(?<!\\)<(img|b)\b", outside)
    assert "[here](" not in outside.replace("\\[", "(")
    assert [line for line in lines if re.match(r"# ", line)] == [lines[1]]
    assert sum(line.startswith("```") for line in lines) % 2 == 0
    assert not any(line.startswith("# Owned") for line in lines)


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


@pytest.mark.parametrize("flag", ["--hub_token {}", "--hub_token={}", "--hub-token {}"])
def test_shorten_command__shows_no_token_of_any_form(flag):
    shortened = shorten_command(f"python run.py {flag.format('secret')} --seed 1")
    assert "secret" not in shortened
    assert shortened.endswith("hf_... --seed 1")


def test_shorten_paths__leaves_out_the_secrets_of_urls():
    text = "https://me:secret@host/a-{0..1}.tar, https://host/b.tar?signature=secret and s3://bucket/c.tar"
    assert shorten_paths(text) == "https://host/a-{0..1}.tar, https://host/b.tar?... and s3://bucket/c.tar"


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


def results_file(folder: Path, *results: dict, **facts) -> None:
    (folder / "metrics.json").write_text(json.dumps({"results": results, **facts}))


KNN = {"name": "kNN, class token", "metric": "accuracy", "value": 0.61, "interval": [0.58, 0.64], "n": 1000}
PIXELS = {"name": "kNN, raw pixels", "metric": "accuracy", "value": 0.5, "reference": True}


def test_card__shows_what_was_measured_with_confidence_intervals(tmp_path):
    results_file(tmp_path, KNN, {"name": "RankMe", "metric": "rank", "value": 33.2}, PIXELS, dataset="ann/birds")
    text = card_text(tmp_path)
    assert "| kNN, class token | accuracy | 0.61 | 0.58 to 0.64 | 1,000 |" in text
    assert "| RankMe | rank | 33.2 |  |  |" in text
    assert "has not been measured" not in text
    (result,) = ModelCard(text).data.eval_results  # neither ranks nor what the encoder is compared with
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "image-classification",
        "ann/birds",
        "accuracy",
    )
    assert (result.metric_name, result.metric_value) == ("kNN, class token", 0.61)


def test_card__says_that_quality_is_not_measured_unless_it_is(tmp_path):
    warning = "The quality of the features has not been measured."
    assert warning in card_text(tmp_path)
    results_file(tmp_path, PIXELS)
    assert warning in card_text(tmp_path)
    assert ModelCard(card_text(tmp_path)).data.eval_results is None


def test_card__takes_up_what_was_measured_after_it_was_written(tmp_path):
    before = card_text(tmp_path)
    results_file(tmp_path, KNN)
    after = card_for(tmp_path, "lab/enc")
    assert "| kNN, class token | accuracy | 0.61 |" in after
    assert "has not been measured" not in after
    assert 'checkpoint = "lab/enc"' in after
    assert ModelCard(after).data.eval_results[0].metric_value == 0.61
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"results": [{"name": "x"}]}', '{"results": [{"name": "x", "value": NaN}]}']
)
def test_card__refuses_a_results_file_that_is_none(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json is not a list of results"):
        card_text(tmp_path)


def test_card__names_license_and_data_sets_of_the_hub(tmp_path):
    data = ModelCard(card_text(tmp_path, license="cc-by-4.0", datasets=["sample", "/home/ann/x", "ann/birds"])).data
    assert data.license == "cc-by-4.0"
    assert data.datasets == ["ann/birds"]
    with pytest.raises(ValueError, match=r"license is 'Apache 2\.0'.*did you mean apache-2\.0\?"):
        card_text(tmp_path, license="Apache 2.0")


def test_card__of_a_classifier_names_its_classes_and_loads_it(tmp_path):
    text = card_text(tmp_path, task=classification_card(["cat", "dog"]), base_model="ann/enc")
    assert ModelCard(text).data.pipeline_tag == "image-classification"
    assert "Classes: cat, dog." in text
    assert "AutoModelForImageClassification" in text
    assert "AutoModelForPreTraining" not in text


def test_card__says_first_that_training_is_in_progress(tmp_path):
    text = card_text(tmp_path, unfinished="Training is in progress: this is step 3 of 9.")
    assert text.index("**Training is in progress: this is step 3 of 9.**") < text.index("An image encoder")


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ("license: mit", None),
        ("license: other\nlicense_name: mine", None),
        ("base_model:\n- a/b\ndatasets: [mnist]", None),
        ("license: other", "license_name"),
        ("license: my-own", "license is 'my-own'"),
        ("license: 3", "license is 3"),
        ("tags: [a, 3]", "tags is"),
        ("tags: {a: b}", "tags is"),
        ("license: mit\nlicense: mit", "duplicate key license"),
        ("tags: [a", "cannot be read as YAML"),
        ("- a", "expected a mapping"),
        ("base_model: /home/ann/enc", "base_model is '/home/ann/enc'"),
        ("datasets: [my birds]", "datasets is 'my birds'"),
        ("model-index: [{name: x}]", "model-index has a missing or misplaced 'results'"),
        ("model-index: 3", "model-index"),
        (
            "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: d}, "
            "metrics: [{type: accuracy, value: true}]}]}]",
            "accuracy True, expected a number",
        ),
    ],
)
def test_rules__are_those_of_the_hub(metadata, part):
    text = f"---\n{metadata}\n---\n# A card\n"
    if part is None:
        check_card(text)
    else:
        with pytest.raises(ValueError, match=re.escape(part)):
            check_card(text)


def test_rules__want_metadata_at_the_top():
    with pytest.raises(ValueError, match="no metadata"):
        check_card("# A card\n\n---\nlicense: mit\n---\n")


@pytest.mark.parametrize(
    ("method", "arxiv"),
    [
        ("mae", "2111.06377"),
        ("simmim", "2111.09886"),
        ("beit", "2106.08254"),
        ("data2vec", "2202.03555"),
        ("data2vec2", "2212.07525"),
    ],
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
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "README.md", "exec")


def test_card__tells_how_to_use_an_encoder_without_a_class_token_or_without_a_native_form(tmp_path):
    assert "last_hidden_state[:, 1:].mean(1)" in card_text(tmp_path)
    swin = card_text(tmp_path, num_extra_tokens=0)
    assert "last_hidden_state.mean(1)" in swin
    assert "[:, 1:]" not in swin
    assert "there is no class token" in swin
    teacher = card_text(tmp_path, has_pooler=False, exported="teacher")
    assert "there is no `pooler_output`" in teacher
    assert "has no classifier. It is the teacher: a moving average of the encoder that was trained.\n" in teacher
    assert "It is the encoder" not in swin
    assert "no image classifier with this encoder" not in swin
    assert "no image classifier with this encoder" in card_text(tmp_path, has_classifier=False)
    assert "AutoModelForImageClassification" not in card_text(tmp_path, has_classifier=False)
    alone = card_text(tmp_path, native_root_problem="a window of 12 is too large")
    assert "a window of 12 is too large" in alone
    assert "AutoModel.from_pretrained" not in alone
    assert 'subfolder="pretraining"' in alone


@pytest.mark.parametrize(("variant", "number"), [("mae", 1), ("dinov2", 5), ("simmim+swin", 0)])
def test_patches__begin_after_class_token_and_registers(variant, number):
    assert num_extra_tokens(tiny_model(variant).encoder) == number
