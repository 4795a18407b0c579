"""Instance segmentation: views of masks, AP of masks, and the command from COCO json to a pipeline."""

import json
import os
import subprocess
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OLDEST, ROOT, tiny_model
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file
from transformers import EomtForUniversalSegmentation, EomtImageProcessorPil

import run_finetune
from commands.parsing import make_parser
from data.instances import NO_OBJECT, InstanceView, collate_instances
from evaluation.instances import average_precision, evaluate_image, panoptic_segments
from evaluation.panoptic_quality import NO_SEGMENT, VOID
from evaluation.segmentation_pictures import Segmentation, draw_segmentations
from hub.export.native import export
from tasks import SETTINGS
from tasks.instance import InstanceTask, _painted, _painted_names

SHORT = ["--use_cpu", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--report_to", "none"]
SHORT += ["--num_queries", "6", "--warmup_steps", "0", "--save_steps", "2", "--eval_steps", "2"]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths, column by column, which start with zeros."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    cuts = np.concatenate([[0], edges, [mask.size] * int(not len(edges) or edges[-1] != mask.size)]).astype(int)
    return {"size": list(mask.shape), "counts": np.diff(cuts).tolist()}


def draw(folder: Path, num_images: int) -> None:
    """Images with a bright and a dark rectangle; the first one has no object, the second one a group."""
    (folder / "images").mkdir(parents=True)
    numbers = np.random.default_rng(num_images)
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "bright"}, {"id": 7, "name": "dark"}]}
    for number in range(num_images):
        pixels = numbers.integers(100, 150, (32, 40, 3), np.uint8)
        content["images"].append({"id": number, "file_name": f"images/{number}.png", "width": 40, "height": 32})
        for label in (3, 7) if number else ():
            mask = np.zeros((32, 40), np.uint8)
            row, column = numbers.integers(0, 20, 2)
            mask[row : row + 12, column : column + 12] = 1
            pixels[mask > 0] = 240 if label == 3 else 10
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [int(column), int(row), 12, 12],
                    "area": 144,
                    "iscrowd": int(number == 1 and label == 7),
                    "segmentation": run_lengths(mask),
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "annotations.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rectangles")
    draw(folder / "train", 6)
    draw(folder / "val", 3)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "tiny-mae"
    export(tiny_model("mae"), folder, method="mae", recipe={"mask_ratio": 0.75})
    return folder


def finetune(encoder: Path, dataset: Path, output_dir: Path, *argv: str, code: int = 0) -> Path:
    named = ["--task", "instance", "--model", str(encoder), "--dataset", str(dataset), "--output_dir", str(output_dir)]
    steps = [] if "--max_steps" in argv else ["--max_steps", "4"]
    parser = partial(make_parser, SETTINGS["instance"])
    assert run_finetune.run([*named, *SHORT, *steps, *argv], run_finetune.main, parser) == code
    return output_dir


@pytest.fixture(scope="module")
def finished(encoder, dataset, tmp_path_factory) -> Path:
    return finetune(encoder, dataset, tmp_path_factory.mktemp("instance") / "out")


# ---- what comes out ----

PIPELINE = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import pipeline
segment = pipeline("image-segmentation", model=sys.argv[1])
found = [segment(path, threshold=0.0, mask_threshold=0.5, overlap_mask_area_threshold=0.0) for path in sys.argv[2:]]
print(json.dumps([[(one["label"], one["score"], list(one["mask"].tobytes())) for one in each] for each in found]))
"""


@pytest.mark.skipif(OLDEST, reason="5.17 opens no image processor without torchvision")
def test_result__a_pipeline_without_this_project_gives_our_masks_and_says_nothing(dataset, finished, monkeypatch):
    paths = [str(dataset / "val" / "images" / f"{number}.png") for number in range(3)]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(finished), *paths],
        cwd=finished,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line] == []

    native = EomtForUniversalSegmentation.from_pretrained(finished).eval()
    settings = json.loads((finished / "preprocessor_config.json").read_text())
    assert settings.pop("image_processor_type") == "EomtImageProcessor"
    processor = EomtImageProcessorPil(**settings)
    mean, std = (torch.tensor(settings[f"image_{name}"]).view(3, 1, 1) * 255 for name in ("mean", "std"))
    view = InstanceView(32, None, Image.Resampling.BILINEAR)  # that of our evaluations
    empty = {"masks": [], "classes": torch.zeros(0), "is_crowd": torch.zeros(0, dtype=torch.bool), "sample_index": 0}
    answers = json.loads(done.stdout)
    assert sum(map(len, answers)) > 0
    for path, theirs in zip(paths, answers, strict=True):
        pixels = view({"image": Path(path).read_bytes(), **empty}, torch.Generator())["pixel_values"]
        with torch.no_grad():
            outputs = native(((pixels - mean) / std)[None])
        (ours,) = processor.post_process_panoptic_segmentation(
            outputs, target_sizes=[(32, 40)], threshold=0.0, mask_threshold=0.5, overlap_mask_area_threshold=0.0
        )
        assert len(ours["segments_info"]) == len(theirs)
        for own, (label, score, mask) in zip(ours["segments_info"], theirs, strict=True):
            assert native.config.id2label[own["label_id"]] == label
            assert own["score"] == pytest.approx(score, abs=1e-4)
            assert (255 * (ours["segmentation"] == own["id"])).flatten().tolist() == mask


def test_result__has_metrics_a_figure_and_a_card(finished):
    metrics = {entry["metric"]: entry for entry in json.loads((finished / "metrics.json").read_text())["results"]}
    assert set(metrics) == {
        *("mask_ap", "mask_ap50", "mask_ap75"),
        *("panoptic_quality", "segmentation_quality", "recognition_quality"),
    }
    assert all(0 <= entry["value"] <= 1 and entry["n"] == 3 for entry in metrics.values())
    assert (finished / "segments.png").exists()
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert f'checkpoint = "{finished}"' not in card
    config = json.loads((finished / "config.json").read_text())
    assert config["id2label"] == {"0": "bright", "1": "dark"}
    assert (config["num_register_tokens"], config["layerscale_value"], config["mim_method"]) == (0, 1.0, "mae")


def test_resume__after_a_kill_gives_the_undisturbed_weights_bit_by_bit(encoder, dataset, finished, tmp_path):
    named = ["--task", "instance", "--model", str(encoder), "--dataset", str(dataset), "--output_dir", str(tmp_path)]
    argv = [*named, *SHORT, "--max_steps", "4"]
    script = ROOT / "tests" / "finetune_and_die.py"
    killed = run_forked([script, "3", *argv], os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert (tmp_path / "checkpoint-2").is_dir()
    finetune(encoder, dataset, tmp_path)
    for name, tensor in load_file(finished / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "model.safetensors")[name]), name
    assert (tmp_path / "metrics.json").read_text() == (finished / "metrics.json").read_text()


def test_step__gives_the_same_weights_however_its_images_are_spread(encoder, dataset, tmp_path):
    """Over micro-batches or processes."""
    flags = ["--optim", "sgd", "--lr_scheduler_type", "constant", "--load_best_model_at_end", "false"]
    one = finetune(encoder, dataset, tmp_path / "one", *flags)
    parts = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    accumulated = finetune(encoder, dataset, tmp_path / "accumulated", *flags, *parts)
    words = [ROOT / "run_finetune.py", "--task", "instance", "--model", encoder, "--dataset", dataset]
    words += [*SHORT, *flags, "--per_device_train_batch_size", "1", "--max_steps", "4"]
    two = tmp_path / "two"
    done = run_forked(
        [*words, "--output_dir", two], os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, num_processes=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    start, expected = (load_file(folder / "model.safetensors") for folder in (one / "checkpoint-2", one))
    assert any(not torch.equal(start[name], expected[name]) for name in expected if name in start)
    for folder in (accumulated, two):
        weights = load_file(folder / "model.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


# ---- views ----


def sample(size=(40, 32)) -> dict:
    pixels = np.full((size[1], size[0], 3), 120, np.uint8)
    masks = [np.zeros((size[1], size[0]), bool) for _ in range(2)]
    masks[0][4:20, 4:20], masks[1][24:30, 30:38] = True, True
    pixels[masks[0]], pixels[masks[1]] = 250, 5
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {
        "image": file.getvalue(),
        "masks": masks,
        "boxes": torch.tensor([[4, 4, 20, 20], [30, 24, 38, 30]]) / torch.tensor([40, 32, 40, 32]),
        "classes": torch.tensor([1, 0]),
        "is_crowd": torch.tensor([False, True]),
        "sample_index": 5,
    }


def test_view__of_an_evaluation_shows_all_of_the_image_at_the_top():
    view = InstanceView(64, None, Image.Resampling.BILINEAR)(sample(), torch.Generator())
    assert view["pixel_values"].shape == (3, 64, 64)
    assert not view["pixel_values"][:, 52:].any()  # 40 x 32 pixels become 64 x 51, then black
    assert view["masks"].sum((1, 2)).tolist() == pytest.approx([256 * 1.6**2, 48 * 1.6**2], rel=0.1)
    assert (view["classes"].tolist(), view["is_crowd"].tolist(), view["sample_index"]) == ([1, 0], [False, True], 5)


def test_view__moves_masks_like_pixels_and_leaves_out_what_it_does_not_show():
    transform = InstanceView(32, (1.5, 2.0), Image.Resampling.BILINEAR)
    numbers = set()
    for seed in range(30):
        view = transform(sample(), torch.Generator().manual_seed(seed))
        numbers.add(len(view["classes"]))
        for mask, label in zip(view["masks"], view["classes"].tolist(), strict=True):
            brightness = view["pixel_values"].float().mean(0)
            inside = torch.nn.functional.max_pool2d(1.0 - mask[None].float(), 3, 1, 1)[0] == 0
            if inside.any():
                assert (brightness[inside].mean() > 100) == (label == 1)
    assert numbers == {1, 2}
    batch = collate_instances([transform(sample(), torch.Generator().manual_seed(seed)) for seed in range(4)])
    assert batch["masks"].shape == (4, 2, 32, 32)
    assert ((batch["classes"] == NO_OBJECT) == ~batch["masks"].bool().flatten(2).any(2)).all()


def test_view__of_an_evaluation_keeps_what_is_too_small_to_be_seen_so_that_it_is_missed():
    small = sample()
    small["masks"].append(np.zeros_like(small["masks"][0]))
    small["masks"][-1][0, 0] = True
    for name, value in (("classes", 0), ("is_crowd", False), ("boxes", [0.0, 0.0, 0.03, 0.03])):
        small[name] = torch.cat([small[name], torch.tensor([value])])
    view = InstanceView(16, None, Image.Resampling.BILINEAR)(small, torch.Generator())
    assert view["masks"].bool().flatten(1).any(1).tolist() == [True, True, False]
    batch = collate_instances([view])
    whole = evaluate_image(
        torch.cat([view["masks"][:1], torch.zeros(1, 16, 16)]).float() * 20 - 10,
        torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]),
        *(batch[name][0].numpy() for name in ("masks", "classes", "is_crowd")),
    )
    assert average_precision([whole], 2)["mask_ap50"] == pytest.approx(0.5)  # one class is found, the other is not


# ---- metrics ----


def test_image__with_perfect_predictions_has_perfect_scores():
    masks = np.zeros((3, 16, 16), np.uint8)
    masks[0, :8], masks[1, 8:, :8], masks[2, 8:, 8:] = 1, 1, 1
    classes, is_crowd = np.array([1, 0, 0]), np.array([False, False, True])
    mask_logits = torch.from_numpy(np.concatenate([masks[:2], np.zeros((1, 16, 16), np.uint8)])).float() * 20 - 10
    class_logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    result = evaluate_image(mask_logits, class_logits, masks, classes, is_crowd)
    assert average_precision([result], 2) == pytest.approx({"mask_ap": 1, "mask_ap50": 1, "mask_ap75": 1})
    np.testing.assert_allclose(result.counts, [[1, 1, 0, 0], [1, 1, 0, 0]])
    segments, labels = panoptic_segments(mask_logits, class_logits, (16, 16))
    assert labels.tolist() == [1, 0]
    assert (segments[:8] == 0).all()
    half = evaluate_image(mask_logits.roll(2, 1), class_logits, masks, classes, is_crowd)
    scores = average_precision([half], 2)  # IoU 0.6
    assert (scores["mask_ap50"], scores["mask_ap75"]) == (pytest.approx(1), 0)
    assert 0.1 < scores["mask_ap"] < 0.5


def test_evaluation__by_several_processes_uses_the_results_of_this_evaluation(monkeypatch):
    processes = [InstanceTask(None, None, {}, SimpleNamespace(class_names=("a",))) for _ in range(2)]
    masks, classes = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.long)
    masks[:, :, :4] = 1

    def ap(is_right: bool) -> float:
        logits = (20.0 if is_right else -20.0) * (masks.float() - 0.5)
        for number, process in enumerate(processes):
            batch = {"masks": masks[[number]], "classes": classes[[number]], "is_crowd": classes[[number]] > 0}
            outputs = {"masks_queries_logits": logits[[number]], "class_queries_logits": torch.tensor([[[5.0, -5.0]]])}
            process._remember(outputs, batch | {"sample_index": torch.tensor([number])})
        parts = [dict(process.own) for process in processes]
        monkeypatch.setattr("tasks.instance.gather_object", lambda own: parts)
        first, second = (process.compute_metrics(np.zeros(2), np.arange(2))["mask_ap"] for process in processes)
        assert first == second
        parts = [{}, {}]
        assert processes[0].compute_metrics(np.zeros(2), np.arange(2))["mask_ap"] == first  # asked again
        return first

    assert [ap(False), ap(True)] == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("num_classes", [3, 254, 255, 1203])
def test_figure__shows_each_of_many_classes_and_void(num_classes):
    class_names = [f"class {number}" for number in range(num_classes)]
    names = _painted_names(class_names)
    classes = np.arange(num_classes)
    painted = _painted(np.array([[NO_SEGMENT, VOID, *classes]]), classes)
    assert [names[number] for number in painted[0, 2:]] == class_names
    assert (names[painted[0, 0]], painted[0, 1], (painted == 255).sum()) == ("background", 255, 1)
    image = np.zeros((*painted.shape, 3), np.uint8)
    draw_segmentations([Segmentation(image, painted, painted, "all")], names, "figure")


def test_ap__is_that_of_pycocotools():
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    numbers = torch.Generator().manual_seed(0)
    results = []
    for _ in range(6):
        masks = np.zeros((3, 16, 16), np.uint8)
        for mask in masks:
            row, column = torch.randint(10, (2,), generator=numbers).tolist()
            mask[row : row + 6, column : column + 6] = 1
        noise = torch.randn(5, 16, 16, generator=numbers)
        logits = torch.from_numpy(np.concatenate([masks, masks[:2]])).float() * 4 - 2 + noise
        classes = torch.randn(5, 3, generator=numbers)
        results.append(evaluate_image(logits, classes, masks, np.array([0, 1, 0]), np.zeros(3, bool)))
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": number, "height": 16, "width": 16} for number in range(6)],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": [
            {**entry, "image_id": number, "id": 10 * number + index + 1, "bbox": [0, 0, 1, 1]}
            for number, result in enumerate(results)
            for index, entry in enumerate(result.true)
        ],
    }
    truth.createIndex()
    found = [{**entry, "image_id": number} for number, result in enumerate(results) for entry in result.predicted]
    theirs = cocoeval.COCOeval(truth, truth.loadRes(found), "segm")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert 0 < theirs.stats[0] < 1
    assert list(average_precision(results, 2).values()) == pytest.approx(theirs.stats[:3].tolist(), abs=1e-6)


# ---- errors ----


def test_run__names_the_problem(encoder, dataset, tmp_path, capsys):
    def refusal(data: Path, *argv: str) -> str:
        finetune(encoder, data, tmp_path / "out", *argv, code=2)
        return capsys.readouterr().err

    assert "--mode is linear, expected finetune" in refusal(dataset, "--mode", "linear")
    content = json.loads((dataset / "train" / "annotations.json").read_text())
    folder = tmp_path / "boxes"
    (folder / "images").parent.mkdir()
    (folder / "images").symlink_to(dataset / "train" / "images")
    content["annotations"] = [{**one, "segmentation": []} for one in content["annotations"]]
    (folder / "annotations.json").write_text(json.dumps(content))
    message = refusal(folder)
    assert "8 of 8 masks of the train split" in message
    assert " of images/2.png has no mask" in message
    content["annotations"] = []
    (folder / "annotations.json").write_text(json.dumps(content))
    assert "has a box that can be used" in refusal(folder)
