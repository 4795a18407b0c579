"""README's code blocks run: training commands with --dry_run, the rest as it is. Installs are those of .ci/run.

CONTRIBUTING's code is that of the example in tests/toys, which tests/test_toys.py runs.
"""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import OLDEST, ROOT, SIZE, tiny_model
from masked import masked_folder
from PIL import Image
from test_texts import CAPTIONS, pair_folder
from train_detector import write_scenes
from transformers import (
    Dinov2Config,
    Dinov2Model,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEModel,
)

import commands.duration
from data.text_tokens import TextTokens, train_text_tokenizer
from hub.export.native import export
from modeling.dvae import DvaeConfig, DvaeModel
from modeling.patches import sincos_positions
from modeling.vqkd import VqkdConfig, VqkdModel

PHOTOGRAPHS = sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))
TRAINING = ("run_pretraining.py", "run_tokenizer.py", "run_finetune.py")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def commands_of(shell: str) -> list[list[str]]:
    """Split shell code into the words of its commands; only `&&` and line ends may separate them."""
    lines = shell.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in words if command]


def check_command(command: list[str]) -> None:
    """Run or check one command of README by its kind.

    Raises:
        AssertionError: If the command fails, or is of no kind that is known here.
    """
    match command:
        case ["python", "-m", "venv", _] | [".", _]:
            pass  # an environment is there already
        case ["pip", "install", *words]:
            check_install(words)
        case ["make", target]:
            assert ["make", target] in ci_commands()
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["accelerate", "launch", *words]:
            launched = launch_command_parser().parse_args(words)
            assert launched.training_script in TRAINING
            few = ["--per_device_train_batch_size", "1", "--dry_run"]
            run_script(launched.training_script, [*launched.training_script_args, *few])
        case ["python", "run_evaluation.py", *words]:
            run_script("run_evaluation.py", words)
        case _:
            raise AssertionError(f"tests/test_readme.py knows no check for this command: {shlex.join(command)}")


def run_script(script: str, argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as exit_of_script:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit_of_script.value.code == 0, shlex.join([script, *argv])


def parse_install(words: list[str]) -> tuple[str, str]:
    """Return the requirements file and the constraints file of a `pip install`."""
    match [word for word in words if word != "--quiet"]:
        case ["-r", requirements, "-c", constraints]:
            return requirements, constraints
    raise AssertionError(f"pip install {shlex.join(words)}: expected -r REQUIREMENTS -c CONSTRAINTS")


def ci_commands() -> list[list[str]]:
    return commands_of((ROOT / ".ci" / "run").read_text(encoding="utf-8"))


def check_install(words: list[str]) -> None:
    """README installs what .ci/run installs, or the part of it that running needs, at the same versions."""
    (ci_words,) = (command[2:] for command in ci_commands() if command[:2] == ["pip", "install"])
    ci_requirements, ci_constraints = parse_install(ci_words)
    requirements, constraints = parse_install(words)
    assert constraints == ci_constraints
    included = re.findall(r"^-r (\S+)$", (ROOT / ci_requirements).read_text(), re.MULTILINE)
    assert requirements in (ci_requirements, *included)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Small versions of the files that README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "photos").mkdir()
    for photograph in PHOTOGRAPHS[:20]:
        (folder / "photos" / photograph.name).symlink_to(photograph)
    for number, photograph in enumerate(PHOTOGRAPHS[:20]):
        path = folder / "labeled" / ("small", "large")[number % 2] / photograph.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(photograph)
    Image.open(PHOTOGRAPHS[0]).save(folder / "photo.jpg")
    export(tiny_model("mae", num_hidden_layers=4), folder / "out", method="mae", recipe={})
    masked_folder(folder / "masked")
    write_scenes(folder / "boxes")
    pair_folder(folder / "pairs")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("\n".join(CAPTIONS))
    tokens = TextTokens(train_text_tokenizer(CAPTIONS, 300), 64)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text_config = RobertaPreLayerNormConfig(max_position_embeddings=65, **tokens.config, **sizes)
    RobertaPreLayerNormModel(text_config).save_pretrained(folder / "out" / "text")
    tokens.tokenizer.save_pretrained(folder / "out" / "text")
    sizes = {"hidden_size": 16, "num_groups": 4, "num_blocks_per_group": 1, "decoder_input_size": 16}
    sizes |= {"image_size": 112, "vocab_size": 16}  # 14 x 14 tokens, as many as a ViT-B/16 has patches
    DvaeModel(DvaeConfig(**sizes)).save_pretrained(folder / "tokenizer")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    small |= {"image_size": SIZE, "patch_size": 8}
    ViTForImageClassification(ViTConfig(**small)).save_pretrained(folder / "out-cls")
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "out-cls")
    sizes = {**{name: size for name, size in small.items() if name != "intermediate_size"}, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "facebook" / "dinov2-small")
    mae = ViTMAEModel(ViTMAEConfig(**small))
    mae.embeddings.position_embeddings.data = sincos_positions((4, 4), 32)
    mae.save_pretrained(folder / "facebook" / "vit-mae-base")
    del small["intermediate_size"]
    Dinov2Model(Dinov2Config(**small)).save_pretrained(folder / "facebook" / "dinov2-small")
    VqkdModel(
        VqkdConfig(encoder_config={**small, "image_size": 224, "patch_size": 16}, vocab_size=16)
    ).save_pretrained(folder / "vqkd")
    return folder


@pytest.mark.parametrize(
    ("language", "code"),
    [pytest.param(*block, marks=pytest.mark.slow if "run_tokenizer.py" in block[1] else ()) for block in BLOCKS],
    ids=[code.split("\n")[-2][:60] for _, code in BLOCKS],
)
def test_block__runs(language, code, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(commands.duration, "_MAX_SECONDS", 0.0)  # so that one step is measured
    if language == "bash":
        for command in commands_of(code):
            check_command(command)
    elif OLDEST and language == "python":
        pytest.skip("5.17 opens no image processor without torchvision")
    else:
        assert language == "python", f"tests/test_readme.py knows no check for a block of {language or 'no language'}"
        exec(compile(code, "README.md", "exec"), {})


def test_blocks__are_all_found():
    fences = re.findall(r"^\s*(?:```|~~~)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS) > 0


def test_contributing__shows_the_code_of_the_example():
    example = (ROOT / "tests" / "toys" / "modeling" / "hog.py").read_text(encoding="utf-8")
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    shown = [code for language, code in blocks if language == "python"]
    assert shown
    for code in shown:
        assert code in example
    installs = [command for language, code in blocks if language == "bash" for command in commands_of(code)]
    check_install(next(command[2:] for command in installs if command[:3] == ["pip", "install", "-r"]))


def test_contributing__names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+/[\w/.-]+\.\w+)[`:]", text):
        assert (ROOT / name).exists() or (ROOT / "tests" / "toys" / name).exists(), name


@pytest.mark.parametrize(
    "shell",
    [
        "accelerate launch run_pretraining.py --dataste ./photos",
        "accelerate launch run_pretraining.py --config recipes/missing.yaml",
        "accelerate launch run_training.py",
        "pip install -r requirements.txt",
        "pip install -r requirements-dev.txt -c constraints-oldest.txt",
        "pip install torch",
        "make tests",
        "rm -r out",
    ],
)
def test_check__fails_for_a_command_that_does_not_work(shell, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    (command,) = commands_of(shell)
    with pytest.raises(AssertionError):
        check_command(command)
