"""Measurements from the command line: pre-training, panel, export, fine-tuning, evaluation."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OLDEST
from measured_images import bands
from PIL import Image
from pretraining_command import pretrain
from torch.testing import assert_close
from transformers import AutoModelForPreTraining, ViTConfig, ViTModel

import run_evaluation
import run_finetune
import run_pretraining
from commands.channels import describe_values
from commands.evaluation_settings import EvaluationSettings
from commands.parsing import make_parser
from commands.pretraining_model import without_weights
from commands.pretraining_settings import PretrainingSettings, load_pretraining_settings
from data.classification import eval_view
from data.images import ImageDataset, SourceSamples, StackedImages
from data.measured import Measured
from data.sources import open_source
from evaluation.preprocessing import open_preprocessor
from hub.export.native import write_image_processor
from hub.init_weights import read_weights
from hub.open_model import open_model
from modeling import CONFIGS, MODELS
from run_pretraining import starting_point
from tasks import SETTINGS, TASKS

tifffile = pytest.importorskip("tifffile")

TINY = ["--model", "vit-nano", "--image_size", "32", "--patch_size", "8", "--use_cpu", "--report_to", "none"]
STEPS = ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "0", "--max_steps", "2"]
CHANNELS = {
    "12 bands": (12, ["--num_channels", "12", "--panel_channels", "8", "4", "0"]),
    "gray": (1, ["--num_channels", "1", "--value_range", "minmax"]),
}


def read(file: Path) -> np.ndarray:
    """Return the values (C, H, W) of a file."""
    return tifffile.imread(file) if file.suffix == ".tif" else np.asarray(Image.open(file))[None]


@pytest.fixture(scope="module", params=CHANNELS)
def trained(request, tmp_path_factory) -> tuple[Path, Path, int]:
    """Labeled images of 16 bits, and the output of a pre-training on them."""
    folder, (num_channels, flags) = tmp_path_factory.mktemp("measured"), CHANNELS[request.param]
    for number in range(12):
        file = folder / "images" / f"class{number % 2}" / f"{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if num_channels == 1:
            Image.fromarray(bands(number, 1, 40)[0]).save(f"{file}.png")
        else:
            tifffile.imwrite(f"{file}.tif", bands(number, 12, 40), photometric="minisblack")
    arguments = [*TINY, *STEPS, *flags, "--dataset", str(folder / "images"), "--output_dir", str(folder / "out")]
    assert pretrain(arguments) == 0
    return folder / "images", folder / "out", num_channels


def test_pretraining__stores_range_and_statistics_and_draws_the_chosen_channels(trained):
    images, out, num_channels = trained
    own = json.loads((out / "pretraining" / "config.json").read_text())
    stacks = [read(file) for file in images.rglob("*.*")]
    config = json.loads((out / "config.json").read_text())
    assert config["num_channels"] == num_channels
    assert config["mim_value_range"] == own["value_range"]
    for channel, (low, high) in enumerate(own["value_range"]):
        values = np.stack([stack[channel] for stack in stacks])
        assert values.min() <= low < high <= values.max()
    assert all(0 < mean < 1 for mean in own["image_mean"])
    card = (out / "README.md").read_text()
    assert f"images with {num_channels} channels of measurements" in card
    assert "| values | uint16 as stored; 0 and 1 are the " in card
    with Image.open(out / "reconstructions.png") as panel:
        assert panel.mode == "RGB"


@pytest.mark.skipif(OLDEST, reason="AutoImageProcessor needs torchvision there")
def test_card__the_code_runs_and_gives_the_features_of_the_evaluation(trained, tmp_path):
    images, out, num_channels = trained
    values = read(sorted(images.rglob("*.*"))[0])
    tifffile.imwrite(tmp_path / "image.tif", values, photometric="minisblack")
    code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[0]
    code = code.replace("path/to/this/folder", str(out)).replace("image.tif", str(tmp_path / "image.tif"))
    names: dict[str, object] = {}
    exec(code, names)
    preprocessor, measured = open_preprocessor(str(out), num_channels), Measured(num_channels, dtype="uint16")
    with torch.no_grad():
        pixel_values = preprocessor([measured.image(tmp_path / "image.tif")])
        features = open_model(str(out)).model(pixel_values).last_hidden_state[:, 1:].mean(1)
    # The code does not round resized values to 16 bits.
    assert_close(names["inputs"]["pixel_values"], pixel_values, atol=2e-3, rtol=0)
    assert_close(names["features"], features, atol=2e-3, rtol=0)
    model = AutoModelForPreTraining.from_pretrained(out / "pretraining")
    exact = values[:, 4:36, 4:36]  # of the encoder's size: nothing is resized
    ours = model.standardize(torch.from_numpy(exact.copy())[None])
    theirs = names["processor"](names["prepare"](exact), input_data_format="channels_first", return_tensors="pt")
    assert_close(theirs["pixel_values"], ours, atol=1e-5, rtol=1e-5)


def test_finetune_and_evaluation__read_the_values_of_the_encoder(trained, tmp_path, capsys):
    images, out, num_channels = trained
    flags = ["--use_cpu", "--report_to", "none", *STEPS, "--dataset", str(images)]
    arguments = ["--model", str(out), "--output_dir", str(tmp_path / "tuned"), *flags]
    parser = partial(make_parser, SETTINGS["classification"])
    assert run_finetune.run(arguments, run_finetune.main, parser) == 0
    assert "values are read as stored" in capsys.readouterr().out
    for name in ("config.json", "preprocessor_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (out, tmp_path / "tuned"))
        key = "mim_value_range" if name == "config.json" else "image_mean"
        assert_close(after[key], before[key])
    assert "AutoModelForImageClassification" in (tmp_path / "tuned" / "README.md").read_text()
    arguments = ["--model", str(tmp_path / "tuned"), "--dataset", str(images), "--use_cpu", "--probes", "knn"]
    parser = partial(make_parser, EvaluationSettings)
    assert run_evaluation.run([*arguments, "--output_dir", str(tmp_path / "report")], run_evaluation.main, parser) == 0
    assert (
        f"{num_channels} channels, cut off at the range of each, 32 x 32 pixels"
        in (tmp_path / "report" / "metrics.json").read_text()
    )


def test_finetune__of_an_encoder_without_its_range_is_one_message(tmp_path, capsys):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    config.mim_value_range = [[0, 5000]] * 3
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--dataset", str(tmp_path), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    parser = partial(make_parser, SETTINGS["classification"])
    assert run_finetune.run(arguments, run_finetune.main, parser) == 2
    expected = f"--model {tmp_path} takes measurements, but has no preprocessor_config.json with their value_range"
    assert expected in capsys.readouterr().err


def test_encoder_of_measurements__is_no_teacher_and_not_compared_on_photographs(tmp_path, capsys):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    for name, ends in (("photographs", None), ("measurements", [[0, 5000]] * 3)):
        ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / name)
        write_image_processor(tmp_path / name, config, [0.5] * 3, [0.2] * 3, value_range=ends)
    measurements, output = str(tmp_path / "measurements"), ["--output_dir", str(tmp_path / "out")]
    flags = ["--method", "feature", "--teacher", measurements, "--dataset", "sample", *TINY, *output]
    assert run_pretraining.run(flags, run_pretraining.main, partial(make_parser, PretrainingSettings, CONFIGS)) == 2
    assert f"--teacher {measurements} takes measurements" in capsys.readouterr().err
    flags = ["--model", str(tmp_path / "photographs"), "--dense", "--compare_with", measurements, *output]
    parser = partial(make_parser, EvaluationSettings)
    assert run_evaluation.run([*flags, "--dataset", "sample", "--use_cpu"], run_evaluation.main, parser) == 2
    assert f"--compare_with {measurements} takes measurements" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "kind"), [(2 * 12 * 32 * 32 * 4, StackedImages), (40_000, ImageDataset)])
def test_evaluation_images__are_kept_by_their_channels_and_bytes(limit, kind, tmp_path, monkeypatch):
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", bands(number, 12, 32))
    samples = SourceSamples(open_source(str(tmp_path), measured=Measured(12)), np.arange(2))
    settings = SimpleNamespace(image_size=32, seed=0, evaluation_view=eval_view((32, 32), 1.0))
    stats = {"image_mean": [0.5] * 12, "image_std": [0.2] * 12, "value_range": [[0, 5000]] * 12}
    splits = SimpleNamespace(by_name={"validation": samples})
    monkeypatch.setattr("tasks.base._MAX_KEPT_BYTES", limit)
    task = TASKS["classification"](settings, ViTConfig(), stats, splits)
    assert type(task.evaluation_set("validation", tmp_path / "bad.jsonl")) is kind


def settings_of(*flags: str) -> object:
    return load_pretraining_settings([*TINY[2:], *flags], CONFIGS, starting_point)


@pytest.mark.parametrize("further", ["mean", "repeat"])
@pytest.mark.parametrize("num_channels", [5, 1])
def test_init__adapts_an_rgb_encoder_that_keeps_its_features(further, num_channels, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    rgb = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    rgb.save_pretrained(tmp_path / "rgb")
    write_image_processor(tmp_path / "rgb", rgb.config, [0.5] * 3, [0.2] * 3)
    flags = ["--num_channels", str(num_channels), "--channel_init", further]
    settings = settings_of("--init_from", str(tmp_path / "rgb"), *flags)
    assert settings.image_stats == "auto"
    stats = {"image_mean": [0.5] * num_channels, "image_std": [0.2] * num_channels}
    config = CONFIGS["mae"](encoder_config=settings.encoder_settings(), **stats)
    weights = read_weights(settings.start, without_weights(config), channel_init=further)
    assert f"patch projection adapted from 3 to {num_channels} channels ({further})" in weights.notes
    model = MODELS["mae"](config).eval()
    model.load_state_dict(weights.state, strict=False)
    photograph = torch.from_numpy(bands(0, 3, 32).astype(np.float32))[None] / 5000 - 1
    if num_channels == 1:  # equal colors
        photograph = photograph[:, :1].expand(-1, 3, -1, -1)
    pixels = torch.zeros(1, num_channels, 32, 32)
    pixels[:, :3] = photograph[:, :num_channels]  # the further channels are at their mean
    with torch.no_grad():
        expected = rgb(photograph).last_hidden_state
        assert_close(model.exported_encoder(pixels).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
        pixels[:, -1] += 1
        assert not torch.allclose(model.exported_encoder(pixels).last_hidden_state, expected, atol=1e-3)


MISTAKES = {
    "--value_range percentile 2 98": "--value_range is percentile 2 98, expected percentile, minmax, or fixed",
    "--value_range fixed 5 5": "the lower one first",
    "--value_range fixed 0 inf": "--value_range is fixed 0 inf, expected percentile, minmax, or fixed",
    "--num_channels 4 --image_stats preset": "expected auto",
    "--channel_files red": "--channel_files has 'red', expected name=pattern",
    "--channel_files a=*_1.tif b=*_2.tif --num_channels 3": "--channel_files names 2 channels, expected 3",
    "--num_channels 12 --panel_channels 1 2 12": "--panel_channels is 1 2 12, expected three of 0, 1, 2",
    "--panel_channels 0 1 2": "--panel_channels has no effect with 3 channels",
    "--channel_init mean": "--channel_init has no effect without --init_from",
    "--num_channels 4 --color_jitter 0.4": "--color_jitter changes the colors of photographs",
    "--num_channels 4 --cache /tmp/cache": "--cache keeps 8-bit copies",
    "--num_channels 4 --method beit": "predicts what a tokenizer makes of 8-bit photographs",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes__each_get_one_clear_message(flags, tmp_path, capsys):
    assert pretrain([*TINY, *flags.split(), "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert MISTAKES[flags] in message
    assert message.count("run_pretraining.py:") == 1


def test_range_in_the_log__is_the_source_s_only_if_it_has_one(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    for ends, expected in ((None, "the percentiles 0.5 and 99.5"), ([[10, 2000]] * 3, f"the values of {tmp_path}")):
        write_image_processor(tmp_path, config, [0.5] * 3, [0.2] * 3, value_range=ends)
        settings = settings_of("--init_from", str(tmp_path), "--tile", "32")
        assert settings.image_stats == "source"
        assert f"0 and 1 are {expected}" in describe_values(settings, "uint16", [[10, 2000]] * 3)


def test_statistics__are_measured_where_the_range_is_not_the_source_s(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    write_image_processor(tmp_path, config, [0.5] * 3, [0.2] * 3, value_range=[[10, 2000]] * 3)
    flags = ["--init_from", str(tmp_path), "--value_range", "fixed", "0", "255"]
    assert settings_of(*flags).image_stats == "auto"
    assert settings_of(*flags[:2]).image_stats == "source"
    assert settings_of(*flags, "--image_stats", "source").image_stats == "source"


def test_channel_files__give_the_number_and_the_names_of_channels():
    settings = settings_of("--channel_files", "red=*_4.tif", "nir=*_8.tif")
    assert (settings.num_channels, settings.image_stats) == (2, "auto")
    assert settings.measured == Measured(2, (("red", "*_4.tif"), ("nir", "*_8.tif")))


def test_photographs__are_no_measurements_unless_asked_for():
    assert settings_of().measured is settings_of("--num_channels", "1").measured is None
    assert settings_of("--value_range", "fixed", "0", "255").measured == Measured(3)
    assert settings_of("--num_channels", "2").measured == Measured(2)
