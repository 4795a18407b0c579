"""Training at growing image sizes: which step sees which size, exact resume, and what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import PATCH, SIZE, tiny_arguments, tiny_model, train_whole_and_resumed
from pretraining_command import pretrain
from test_run_pretraining import refusal
from transformers import AutoModel

import run_pretraining
from data.augmentations import build_views
from data.collators import MaskingCollator
from data.images import ImageDataset, SourceSamples
from data.size_schedule import ScheduledTransform, as_data_steps, first_steps_of_stages
from data.sources import open_source
from modeling import CONFIGS
from modeling.views import View
from training.trainer import MimTrainer

SIDES = (SIZE // 2, SIZE)
SMALL = ["--model", "vit-nano", "--per_device_train_batch_size", "8", "--use_cpu", "--report_to", "none"]


def scheduled_images(first_steps: tuple[int, ...], num_images: int = 24, images_per_step: int = 8) -> ImageDataset:
    source = open_source("sample")
    samples = SourceSamples(source, np.arange(num_images))
    transforms = tuple(
        build_views([View()], image_size=(side, side), crop_scale=(0.2, 1.0), num_channels=3, train=True)
        for side in SIDES
    )
    transform = ScheduledTransform(transforms, first_steps)
    return ImageDataset(samples, transform, train=True, images_per_step=images_per_step)


def test_stages__have_equally_many_steps():
    assert first_steps_of_stages(4, 100) == [0, 25, 50, 75]
    assert first_steps_of_stages(3, 100) == [0, 33, 67]
    assert first_steps_of_stages(0, 100) == []


def test_items__have_the_size_of_their_step_without_any_state():
    images = scheduled_images((0, 4))
    sides = [images[counter]["pixel_values"].shape[-1] for counter in (0, 31, 32, 47, 24)]
    assert sides == [SIDES[0], SIDES[0], SIDES[1], SIDES[1], SIDES[0]]


def test_items__show_the_same_crop_at_another_size():
    small, large = scheduled_images((0, 4)), scheduled_images((0, 0))
    pixels = torch.nn.functional.avg_pool2d(large[0]["pixel_values"].float(), 2)
    difference = (small[0]["pixel_values"] - pixels).abs().mean()
    assert difference < 6 < (small[1]["pixel_values"] - pixels).abs().mean()


def test_steps__an_epoch_with_a_dropped_rest_counts_one_more_in_the_data():
    # 20 images in steps of 8: two steps are trained, the data set counts three
    images = scheduled_images(as_data_steps((0, 3), 2, 3), num_images=20)
    sides = [images[counter]["pixel_values"].shape[-1] for counter in (0, 8, 20, 27, 28, 35, 40)]
    assert sides == [SIDES[0]] * 4 + [SIDES[1]] * 3


class SeesSizes(MimTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        self.sides = getattr(self, "sides", {})
        self.sides.setdefault(self.state.global_step, set()).add(inputs["pixel_values"].shape[-1])
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume__inside_a_stage_is_bitwise(tmp_path, num_workers):
    def make_trainer(folder, callbacks):
        return SeesSizes(
            model=tiny_model("mae+cross"),
            args=tiny_arguments(
                folder,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=2,
                dataloader_num_workers=num_workers,
                dataloader_persistent_workers=num_workers > 0,
            ),
            train_dataset=scheduled_images(as_data_steps((0, 3), 2, 3), num_images=17),
            data_collator=MaskingCollator(
                (SIZE // PATCH, SIZE // PATCH), 0.75, with_image_index=True, image_size=(SIZE, SIZE)
            ),
            callbacks=callbacks,
        )

    whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    assert whole.sides == {step: {SIDES[0] if step < 3 else SIDES[1]} for step in range(8)}
    assert resumed.sides == {step: whole.sides[step] for step in range(4, 8)}
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name


def test_resume__with_other_images_per_step_changes_size_at_the_same_step(tmp_path):
    def train(batch_size, num_steps, checkpoint=None):
        settings = {"max_steps": num_steps, "per_device_train_batch_size": batch_size}
        trainer = SeesSizes(
            model=tiny_model("mae+cross"),
            args=tiny_arguments(tmp_path, **settings, save_strategy="steps", save_steps=5),
            train_dataset=scheduled_images((0, 7), images_per_step=batch_size),
            data_collator=MaskingCollator((SIZE // PATCH, SIZE // PATCH), 0.75, image_size=(SIZE, SIZE)),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.sides

    assert train(4, 5) == {step: {SIDES[0]} for step in range(5)}
    expected = {5: {SIDES[0]}, 6: {SIDES[0]}, 7: {SIDES[1]}, 8: {SIDES[1]}}  # 20 images, then 8 in each step
    assert train(8, 9, tmp_path / "checkpoint-5") == expected


def test_command__changes_size_at_the_right_steps_with_repeated_crops(tmp_path, monkeypatch):
    images, trainers = tmp_path / "images", []
    images.mkdir()
    for number in range(4):
        (images / f"{number}.jpg").write_bytes(open_source("sample").read(number))

    class Noted(SeesSizes):
        def __init__(self, *args, **kwargs):
            trainers.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run_pretraining, "MimTrainer", Noted)
    flags = ["--dataset", str(images), "--validation_fraction", "0", "--repeated_aug", "4", "--output_dir"]
    stages = ["--image_size_schedule", "32", "48", "64", "--max_steps", "6", "--per_device_train_batch_size", "8"]
    assert pretrain([*SMALL, *flags, str(tmp_path / "out"), *stages]) == 0  # 16 crops: two steps an epoch
    assert trainers[0].sides == {0: {32}, 1: {32}, 2: {48}, 3: {48}, 4: {64}, 5: {64}}


def test_command__trains_in_stages_and_exports_the_last_size(tmp_path, capsys):
    flags = ["--image_size_schedule", "32", "48", "64", "--max_steps", "6", "--output_dir", str(tmp_path)]
    assert pretrain([*SMALL, *flags, "--decoder", "cross", "--prediction_ratio", "0.25", "--num_masks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "32 from step 0, 48 from step 2, 64 from step 4" in printed
    assert "48 of 64 patches masked, 25% of them predicted, 2 masks per image" in printed
    assert AutoModel.from_pretrained(tmp_path).config.image_size == 64
    config = json.loads((tmp_path / "pretraining" / "config.json").read_text())
    assert config["decoder"] == "cross"
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["images_seen"] for entry in state["log_history"] if "images_seen" in entry][-1] == 6 * 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size_schedule", "64", "32"], "expected numbers that rise"),
        (["--image_size_schedule", "30", "64"], "expected multiples of 8"),
        (["--image_size_schedule", "32", "48"], "add --image_size 48"),
        (["--image_size_schedule", "32", "64", "--dataloader_drop_last=false"], "needs --dataloader_drop_last"),
        (["--image_size_schedule", "32", "64", "--method", "simmim"], "such as mae"),
        (["--prediction_ratio", "0.5", "--method", "simmim"], "with data2vec2, hybrid, mae, simmim-asymmetric"),
        (["--num_masks", "2", "--method", "simmim"], "with data2vec2, hybrid, mae, simmim-asymmetric"),
        (["--prediction_ratio", "0"], "expected a number above 0 and at most 1"),
        (["--decoder", "mixed"], "expected self or cross"),
    ],
)
def test_command__refuses(capsys, tmp_path, flags, message):
    assert message in refusal(capsys, *SMALL, "--max_steps", "2", "--output_dir", str(tmp_path), *flags)


def test_config__only_methods_without_positions_of_one_size_resize():
    assert {name for name, config in CONFIGS.items() if config().resizes_positions} >= {"mae", "simmim-asymmetric"}
