"""Object detection: the encoder in LW-DETR, its loss, average precision, and runs by the command."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import OLDEST, ROOT, tiny_model
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file
from test_run_finetune import finetune
from torch.testing import assert_close
from train_detector import PATCH, SIDE, tiny_detector, write_scenes
from transformers import (
    AutoModelForObjectDetection,
    BeitConfig,
    BeitModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    LwDetrForObjectDetection,
    SwinConfig,
    ViTConfig,
    ViTModel,
    pipeline,
)

from commands.finetune_settings import load_finetune_settings
from commands.memory import in_training, measure_footprint
from evaluation.detection import PADDING, as_coco, detection_metrics
from hub.export.native import export
from modeling.detection import best_boxes, build_detector, check_encoder, native_detector
from modeling.patches import patch_grid
from modeling.positions import resize_positions
from tasks import SETTINGS
from tasks.detection import DetectionSettings
from training.finetune_trainer import freeze
from training.layer_decay import layer_ids

SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
ENCODERS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64), add_pooling_layer=False),
    "gray": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64, num_channels=1)),
    "deit": lambda: DeiTModel(DeiTConfig(**SIZES, intermediate_size=64)),
    "beit": lambda: BeitModel(
        BeitConfig(**SIZES, intermediate_size=64, use_absolute_position_embeddings=True, layer_scale_init_value=0.4)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.3)),
}


@torch.no_grad()
def patch_features(encoder, pixels, num_windows=1, windowed=()) -> list[torch.Tensor]:
    """The outputs of all blocks on the patches alone, (B, D, h, w), some with attention inside windows."""
    config, grid = encoder.config, patch_grid(pixels.shape[-2:], encoder.config.patch_size)
    table = resize_positions(
        encoder.embeddings.position_embeddings, patch_grid(config.image_size, config.patch_size), grid
    )
    patches = encoder.embeddings.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)
    tokens, features = patches + table[:, -patches.shape[1] :], []

    def cut(tokens):
        rows = tokens.reshape(-1, num_windows, grid[0] // num_windows, num_windows, grid[1] // num_windows, 32)
        return rows.transpose(2, 3).reshape(-1, patches.shape[1] // num_windows**2, 32)

    def joined(windows):
        rows = windows.reshape(-1, num_windows, num_windows, grid[0] // num_windows, grid[1] // num_windows, 32)
        return rows.transpose(2, 3).reshape(-1, patches.shape[1], 32)

    for number, layer in enumerate(encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers):
        outputs = layer(cut(tokens)) if number in windowed else layer(tokens)
        tokens = joined(outputs) if number in windowed else outputs
        features.append(tokens.transpose(1, 2).unflatten(2, grid))
    return features


@pytest.mark.parametrize("kind", ENCODERS)
def test_carrier__equals_the_patch_features_of_the_encoder(kind):
    torch.manual_seed(0)
    encoder = ENCODERS[kind]().eval()
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vit = build_detector(encoder, ["a", "b"], image_size=SIDE, num_queries=4, box_size=(0.25, 0.5)).eval().base_model
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = patch_features(encoder, pixels.mean(1, keepdim=True) if kind == "gray" else pixels)
    if kind == "gray":  # as ITU-R 601 weighs the channels
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        expected = patch_features(encoder, (pixels * weights).sum(1, keepdim=True))
    with torch.no_grad():
        found = vit(pixels).feature_maps
    assert vit.config.out_indices == [2, 3, 4, 5]
    for block, features in zip((2, 3, 4, 5), found, strict=True):
        assert_close(features, expected[block - 1], atol=1e-5, rtol=0)


def test_carrier__of_a_larger_image_has_windows_as_large_as_the_images_of_the_encoder():
    torch.manual_seed(0)
    encoder = ENCODERS["vit"]().eval()
    vit = (
        build_detector(encoder, ["a", "b"], image_size=2 * SIDE, num_queries=4, box_size=(0.25, 0.5)).eval().base_model
    )
    assert (vit.config.num_windows, vit.config.window_block_indices) == (4, [0])
    pixels = torch.randn(2, 3, 2 * SIDE, 2 * SIDE)
    expected = patch_features(encoder, pixels, num_windows=2, windowed=[0])
    with torch.no_grad():
        for block, features in zip((2, 3, 4, 5), vit(pixels).feature_maps, strict=True):
            assert_close(features, expected[block - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SwinConfig(), "is a swin, expected one of vit"),
        (BeitConfig(use_shared_relative_position_bias=True), "relative position biases"),
        (Dinov2Config(use_swiglu_ffn=True), "gated layers"),
        (ViTConfig(hidden_size=32, num_attention_heads=2, intermediate_size=48), "MLP 1.5 times as wide"),
    ],
)
def test_encoder__that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_encoder(config)


# ---- the loss ----


def targets(*numbers: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    boxes = [0.2 + 0.3 * torch.rand(number, 4, generator=generator) for number in numbers]
    return [{"class_labels": torch.arange(len(each)) % 2, "boxes": each} for each in boxes]


@pytest.mark.parametrize("width", [32, 768])  # one scale of features, two
def test_boxes__of_an_untrained_detector_are_as_large_as_asked_for(width):
    config = ViTConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, intermediate_size=width)
    config.image_size, config.patch_size = SIDE, PATCH
    detector = build_detector(ViTModel(config), ["a", "b"], image_size=SIDE, num_queries=4, box_size=(0.3, 0.4))
    sizes = detector.eval()(torch.randn(3, 3, SIDE, SIDE)).pred_boxes[..., 2:]
    if width < 768:
        assert_close(sizes, torch.tensor([0.3, 0.4]).expand_as(sizes))
    else:  # the boxes of the coarser scale are twice as large as those of the finer one
        factors = sizes / torch.tensor([0.3, 0.4])
        assert {round(value, 3) for value in factors.flatten().tolist()} <= {0.707, 1.414}


def test_loss__equals_that_of_transformers_where_every_image_has_boxes():
    detector, pixels, labels = tiny_detector(), torch.randn(3, 3, SIDE, SIDE), targets(1, 2, 3)
    native = LwDetrForObjectDetection(detector.config)
    native.load_state_dict(detector.state_dict())
    for module in native.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    expected = native(pixels, labels=labels).loss
    assert_close(detector.train()(pixels, labels=labels).loss, expected)
    assert native_detector(detector)(pixels).logits.shape == (3, detector.config.num_queries, 2)


def test_loss__does_not_depend_on_how_images_are_batched():
    detector, pixels, labels = tiny_detector(), torch.randn(4, 3, SIDE, SIDE), targets(2, 0, 3, 1)

    def total(some: slice) -> torch.Tensor:
        loss = detector(pixels[some], labels=labels[some]).loss
        return loss * detector.loss_counts({"targets": labels[some]})["loss"]

    detector.train()
    assert detector.loss_counts({"targets": labels}) == {"loss": 7}
    whole = total(slice(None))
    assert_close(total(slice(0, 1)) + total(slice(1, 2)) + total(slice(2, 4)), whole, rtol=1e-5, atol=1e-5)
    detector.eval()
    each = [detector(pixels[[i]], labels=[labels[i]]).loss for i in range(4)]
    assert_close(detector(pixels, labels=labels).loss, torch.stack(each).mean(), rtol=1e-5, atol=1e-5)


def test_plan__counts_the_queries_of_all_groups():
    detector, batch = tiny_detector(), {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}
    config = detector.config
    for_an_image = measure_footprint(detector.eval(), batch).flops_per_image
    trained = measure_footprint(in_training(detector), batch).flops_per_image
    feed_forward = 2 * config.d_model * config.decoder_ffn_dim * config.decoder_layers
    more_queries = (config.group_detr - 1) * config.num_queries
    assert trained > for_an_image + 3 * 2 * feed_forward * more_queries


def test_loss__of_certain_and_wrong_predictions_is_finite():
    detector = tiny_detector().train()
    with torch.no_grad():
        for head in (detector.class_embed, *detector.model.enc_out_class_embed):
            head.bias.fill_(200.0)
    loss = detector(torch.randn(1, 3, SIDE, SIDE), labels=targets(1)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


@pytest.mark.parametrize("trains", [True, False])
def test_loss__of_boxes_that_are_no_numbers_is_none_so_that_the_guard_can_say_why(trains):
    detector = tiny_detector().train(trains)
    with torch.no_grad():
        detector.model.reference_point_embed.weight.fill_(torch.nan)
    assert not torch.isfinite(detector(torch.randn(2, 3, SIDE, SIDE), labels=targets(1, 0)).loss)


def test_layers__are_numbered_from_the_embeddings_and_a_frozen_encoder_leaves_the_detector():
    detector = tiny_detector()
    ids = layer_ids(detector)
    assert ids["model.backbone.backbone.embeddings.position_embeddings"] == 0
    assert ids["model.backbone.backbone.encoder.layer.1.gamma_1"] == 2
    last = max(ids.values())
    assert {ids[name] for name in ids if ".backbone.backbone." not in name} == {last}
    freeze(detector, "linear", 4)
    trained = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in ids if ".backbone.backbone." not in name}


# ---- average precision ----


def random_boxes(random: np.random.RandomState, num_images: int, num_boxes: int) -> np.ndarray:
    corner, sides = random.rand(num_images, num_boxes, 2) * 200, 1 + random.rand(num_images, num_boxes, 2) ** 2 * 300
    return np.concatenate([corner, corner + sides], axis=2)


def test_metrics__equal_those_of_pycocotools():
    pytest.importorskip("faster_coco_eval")
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    random, names = np.random.RandomState(0), ["a", "b", "c"]
    boxes = random_boxes(random, 30, 6)
    classes, crowds = random.randint(0, 3, (30, 6, 1)), random.rand(30, 6, 1) < 0.1
    areas = 0.8 * (boxes[..., 2:] - boxes[..., :2]).prod(2, keepdims=True)
    labels = np.concatenate([boxes, classes, areas, crowds], axis=2)
    labels[3:5] = PADDING  # images without boxes
    labels[7, 2:] = PADDING
    noise, scores = random.randn(30, 6, 4) * 8, random.rand(30, 6, 1)
    near = np.concatenate([boxes + noise, scores, np.where(random.rand(30, 6, 1) < 0.8, classes, 0)], axis=2)
    far = np.concatenate(
        [random_boxes(random, 30, 4), random.rand(30, 4, 1), random.randint(0, 3, (30, 4, 1))], axis=2
    )
    predictions = np.concatenate([near, far], axis=1)
    predictions[..., 2:4] = np.maximum(predictions[..., 2:4], predictions[..., :2] + 1)

    truth = pycocotools.COCO()
    truth.dataset = as_coco(labels, names)
    truth.createIndex()
    found = [
        {"image_id": image, "category_id": int(row[5]), "score": row[4], "bbox": [*row[:2], *(row[2:4] - row[:2])]}
        for image, rows in enumerate(predictions)
        for row in rows
    ]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = detection_metrics(predictions, labels, names)
    assert list(ours) == ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    np.testing.assert_allclose(list(ours.values()), evaluation.stats[:6], atol=1e-9)
    assert 0.05 < ours["ap"] < 0.95


def test_metrics__without_any_object_are_0():
    labels, found = np.full((2, 1, 7), PADDING, float), np.array([[[1, 1, 9, 9, 0.5, 0]]] * 2, float)
    assert detection_metrics(found, labels, ["a"]) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}


def test_metrics__of_a_hand_computed_case():
    pytest.importorskip("faster_coco_eval")
    labels = np.array([[[0, 0, 100, 100, 0, 1e4, 0]], [[50, 50, 150, 150, 0, 1e4, 0]]], float)
    right, wrong = [0, 0, 100, 100, 0.9, 0], [0, 0, 10, 10, 0.8, 0]
    found = detection_metrics(np.array([[right], [wrong]], float), labels, ["a"])
    # One of two is found, without an error above it: precision 1 up to a recall of 0.5, that is at 51 of 101 points.
    assert found == pytest.approx({"ap": 51 / 101, "ap50": 51 / 101, "ap75": 51 / 101, "ap_large": 51 / 101})


def test_best_boxes__equal_those_of_the_image_processor():
    from transformers.models.deformable_detr.image_processing_pil_deformable_detr import (
        DeformableDetrImageProcessorPil,
    )
    from transformers.utils import ModelOutput

    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 50, 3, generator=generator), torch.rand(2, 50, 4, generator=generator)
    process = DeformableDetrImageProcessorPil().post_process_object_detection
    expected = process(ModelOutput(logits=logits, pred_boxes=boxes), threshold=0.0)
    for found, one in zip(best_boxes(logits, boxes), expected, strict=True):
        assert_close(found[:, :4], one["boxes"])
        assert_close(found[:, 4], one["scores"])
        assert found[:, 5].tolist() == one["labels"].tolist()


# ---- runs ----

RUN = [
    "--task",
    "detection",
    "--num_queries",
    "8",
    "--resize_scale",
    "0.5",
    "1.5",
    "--per_device_train_batch_size",
    "4",
]
PIPELINE = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import pipeline
print(json.dumps(pipeline("object-detection", model=sys.argv[2])(sys.argv[1], threshold=0.0)))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    pytest.importorskip("faster_coco_eval")
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    export(tiny_model("mae"), folder, method="mae", recipe={"mask_ratio": 0.75})
    return folder


@pytest.fixture(scope="module")
def trained(encoder, scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    return finetune(encoder, scenes, out, *RUN, "--eval_steps", "3", "--save_steps", "3")


def test_run__writes_metrics_a_figure_and_a_card(trained):
    content = json.loads((trained / "metrics.json").read_text())
    found = {entry["metric"]: entry["value"] for entry in content["results"]}
    assert content["part"] == "validation"
    assert {"ap", "ap50", "ap75"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())
    assert Image.open(trained / "detections.png").width > 500
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card
    assert "the quality of the features has not been measured" not in card.lower()
    assert "detections.png" in card


@pytest.mark.skipif(OLDEST, reason="5.17 opens no image processor without torchvision")
def test_result__a_pipeline_without_this_project_gives_our_boxes_and_says_nothing(trained, scenes, tmp_path):
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    photograph = sorted((scenes / "val").glob("*.png"))[0]
    command = [sys.executable, "-c", PIPELINE, str(photograph), str(trained)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line] == []
    theirs = json.loads(done.stdout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForObjectDetection.from_pretrained(trained, output_loading_info=True)
    assert not any(info.values())
    assert type(model) is LwDetrForObjectDetection
    detector = tiny_detector(model.config)
    detector.load_state_dict(model.state_dict())
    inputs = pipeline("object-detection", model=str(trained)).image_processor(
        Image.open(photograph).convert("RGB"), return_tensors="pt"
    )
    with torch.no_grad():
        outputs = detector.eval()(**inputs)
    width, height = Image.open(photograph).size
    ours = best_boxes(outputs.logits, outputs.pred_boxes)[0]
    assert len(ours) == len(theirs)
    for row, found in zip(ours.tolist(), theirs, strict=True):
        assert found["score"] == pytest.approx(row[4], abs=1e-4)
        assert found["label"] == model.config.id2label[int(row[5])]
        corners = [row[0] * width, row[1] * height, row[2] * width, row[3] * height]
        assert list(found["box"].values()) == pytest.approx(corners, abs=1.001)  # the pipeline cuts off decimals


def test_killed_run__ends_with_the_weights_of_an_undisturbed_one(trained, encoder, scenes, tmp_path):
    out = tmp_path / "out"
    named = ["--model", str(encoder), "--dataset", str(scenes), "--output_dir", str(out), "--max_steps", "6"]
    flags = ["--use_cpu", "--learning_rate", "1e-3", "--report_to", "none", "--schedule", "published", *RUN]
    flags += ["--eval_steps", "3", "--save_steps", "3"]
    killed = run_forked(
        [ROOT / "tests/finetune_and_die.py", "5", *named, *flags], os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert killed.returncode != 0
    assert not (out / "config.json").exists()
    finetune(encoder, scenes, out, *RUN, "--eval_steps", "3", "--save_steps", "3")
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (trained, out))
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    metrics = [json.loads((folder / "metrics.json").read_text())["results"] for folder in (trained, out)]
    assert metrics[0] == metrics[1]


def test_accumulation_and_two_processes__equal_one_process_with_one_batch(tmp_path):
    script, environment = ROOT / "tests" / "train_detector.py", os.environ | {"PYTHONPATH": str(ROOT)}
    for name, num_processes in (("one", None), ("parts", None), ("two", 2)):
        done = run_forked([script, tmp_path, name], environment, num_processes=num_processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, parts, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "parts", "two"))
    assert two["world_size"] == 2
    assert one["losses"][0] != one["losses"][-1]
    for other in (parts, two):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for name, expected in one["weights"].items():
            assert_close(other["weights"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "width", "decay", "epochs"), [("base", 768, 0.7, 100), ("large", 1024, 0.8, 100), ("huge", 1280, 0.9, 75)]
)
def test_recipe__has_the_published_settings(size, width, decay, epochs):
    config = ViTConfig(hidden_size=width, intermediate_size=4 * width)
    assert DetectionSettings.recipe_for(config, "finetune") == f"finetune_vitdet_vit-{size}"
    text = (ROOT / f"recipes/finetune_vitdet_vit-{size}.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["base_learning_rate"] == pytest.approx(1e-4 * 256 / 64)
    assert (recipe["layer_decay"], recipe["num_train_epochs"], recipe["weight_decay"]) == (decay, epochs, 0.1)
    assert recipe["warmup_epochs"] == pytest.approx(250 * 64 / 118_000, abs=1e-3)
    assert recipe["resize_scale"] == [0.1, 2.0]
    argv = text.split("run_finetune.py ")[1].splitlines()[0].split()
    settings = load_finetune_settings(argv, SETTINGS, lambda name: config)
    assert (settings.image_size, settings.layer_decay) == (1024, decay)
    own_size = load_finetune_settings(argv[2:8], SETTINGS, lambda name: config)  # 224 pixels, which need less jitter
    assert own_size.resize_scale == pytest.approx((102.4 / 224, 2.0), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop_path", "0.1"], "--drop_path 0.1: transformers' LW-DETR has no drop path"),
        (["--crop_scale", "0.5", "1"], "--crop_scale has no effect with masks or boxes"),
        (["--image_size", "60"], "60"),
    ],
)
def test_run__refuses_flags_that_it_cannot_follow(encoder, scenes, tmp_path, capsys, flags, message):
    finetune(encoder, scenes, tmp_path / "out", "--task", "detection", *flags, code=2)
    assert message in capsys.readouterr().err
