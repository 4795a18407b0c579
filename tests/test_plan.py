"""The arithmetic of a run, against figures worked out by hand, and what is said when data are few."""

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

import run_pretraining
from commands.arithmetic import Hardware
from commands.memory import Footprint, measure_footprint
from commands.pretraining_batches import build_collator, transform_of
from commands.pretraining_plan import PretrainingPlan
from commands.pretraining_settings import load_pretraining_settings
from commands.texts import TextSplits
from data.bad_images import BadImages
from data.text_tokens import TextTokens, train_text_tokenizer
from modeling import MODELS

CONFIGS = {method: head.config_class for method, head in MODELS.items()}
LAPTOP = Hardware("cpu", num_cpus=2)
GPU = Hardware("cuda", num_cpus=16, has_bf16=True)


def plan(
    *argv: str,
    images: int | None = 1000,
    validation: int = 50,
    hardware: Hardware = LAPTOP,
    footprint: Footprint = Footprint(111_900_000, 111_700_000, 1, 56 * 10**9),  # noqa: B008
) -> PretrainingPlan:
    settings = load_pretraining_settings(argv, CONFIGS)
    return PretrainingPlan.make(settings, hardware, (images, validation), footprint, "folder photos", settings.grid)


def plan_of_real_model(*argv: str) -> PretrainingPlan:
    """With one image a device, and the memory of the model itself."""
    settings = load_pretraining_settings([*argv, "--per_device_train_batch_size", "1"], CONFIGS)
    config = CONFIGS[settings.method](encoder_config=settings.encoder_settings(), **settings.method_settings)
    footprint = run_pretraining.model_footprint(settings, config, build_collator(settings, config))
    return PretrainingPlan.make(settings, LAPTOP, (1000, 50), footprint, "folder photos", settings.grid)


def gpus(world_size: int, num_cpus: int = 96) -> Hardware:
    return Hardware("cuda", num_cpus, world_size, num_local_processes=world_size, has_bf16=True)


# ---- batch and steps ----


def test_batch__is_64_on_a_gpu_and_8_on_a_cpu_unless_given():
    assert plan(hardware=GPU).batch_size == 64
    assert plan().batch_size == 8
    assert plan("--per_device_train_batch_size", "5").batch_size == 5


def test_three_images__are_one_step_of_three_and_the_run_gets_2000_steps():
    tiny = plan(images=3, validation=0)
    assert (tiny.batch_size, tiny.accumulation, tiny.steps_per_epoch, tiny.num_steps) == (3, 1, 1, 2000)
    assert any(note.startswith("3 images per device instead of 8") for note in tiny.notes)
    assert any(note.startswith("2,000 epochs instead of 800") for note in tiny.notes)
    assert any(note.startswith("there are no validation images") for note in tiny.notes)
    assert tiny.training_arguments()["eval_strategy"] == "no"


def test_fifty_images__on_a_gpu_are_one_step_of_fifty():
    small = plan("--gradient_accumulation_steps", "4", images=50, hardware=GPU)
    assert (small.batch_size, small.accumulation, small.steps_per_epoch) == (50, 1, 1)
    assert any(note.startswith("accumulation over 1 instead of 4") for note in small.notes)


def test_thousand_images__keep_the_batch_and_the_epochs_of_the_method():
    usual = plan()
    assert (usual.steps_per_epoch, usual.num_steps) == (125, 100_000)
    assert usual.notes == ()


def test_stream__is_one_epoch_of_max_steps_and_needs_them():
    stream = plan("--max_steps", "300", images=None)
    assert (stream.batch_size, stream.steps_per_epoch, stream.num_steps) == (8, 300, 300)
    assert "an unknown number for training" in stream.describe()
    with pytest.raises(ValueError, match="a data set without a length needs max_steps"):
        plan(images=None)


def test_two_processes__share_the_images():
    two = plan(images=101, hardware=gpus(2))
    assert two.batch_size == 50  # 101 // 2
    assert (two.images_per_step, two.steps_per_epoch) == (100, 1)


def test_accumulation__a_last_smaller_step_counts():
    few = plan("--gradient_accumulation_steps", "4", images=50)
    assert (few.accumulation, few.steps_per_epoch) == (4, 2)  # 6 batches of 8: a step of 4 and one of 2
    assert few.images_per_step == 32


def test_fewer_images_than_processes__is_an_error_that_says_how_many_can_start():
    with pytest.raises(ValueError, match=r"4 processes cannot share 3 training image.*at most 3"):
        plan(images=3, hardware=gpus(4))


def test_keeping_the_last_batch__rounds_up():
    assert plan("--dataloader_drop_last", "false", images=50).steps_per_epoch == 7
    assert plan("--dataloader_drop_last", "false", images=50, hardware=gpus(2)).steps_per_epoch == 1


@pytest.mark.parametrize(("images", "drop_last"), [(50, "true"), (50, "false"), (48, "true"), (3, "true")])
def test_steps_per_epoch__are_those_that_trainer_counts(images, drop_last, tmp_path):
    few = plan("--dataloader_drop_last", drop_last, "--gradient_accumulation_steps", "4", images=images)
    arguments = few.training_arguments() | {"output_dir": str(tmp_path), "max_steps": -1, "num_train_epochs": 1}
    arguments |= {"report_to": "none", "eval_strategy": "no"}
    dataset = [{"x": torch.zeros(1)}] * images
    trainer = Trainer(torch.nn.Linear(1, 1), TrainingArguments(**arguments), train_dataset=dataset)
    counted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert few.steps_per_epoch == counted[1]


# ---- length ----


def test_epochs__given_by_the_user_are_never_raised(tmp_path):
    recipe = tmp_path / "short.yaml"
    recipe.write_text("num_train_epochs: 3\n", encoding="utf-8")
    assert plan("--num_train_epochs", "3", images=80).num_steps == 30
    assert plan("--config", str(recipe), images=80).num_steps == 30
    assert plan("--num_train_epochs", "0.25", images=80).num_steps == 3


def test_max_steps__wins_unless_epochs_are_given_later():
    assert plan("--max_steps", "3").num_steps == 3
    assert plan("--config", "quickstart").num_steps == 900
    assert plan("--config", "quickstart", "--num_train_epochs", "2").num_steps == 2 * (1000 // 64)


# ---- learning rate and warm-up ----


def test_learning_rate__scales_with_the_images_a_step():
    assert plan(images=1_281_167, hardware=gpus(8)).learning_rate == pytest.approx(1.5e-4 * 512 / 256)
    assert plan("--learning_rate", "0.1").learning_rate == 0.1
    assert "as given" in plan("--learning_rate", "0.1").describe()


def test_warmup__is_the_methods_epochs_but_at_most_a_tenth():
    assert plan().warmup_steps == 40 * 125
    assert plan("--max_steps", "100").warmup_steps == 10
    assert any("a tenth of the run" in note for note in plan("--max_steps", "100").notes)


def test_lr_drop__is_the_first_step_of_its_epoch_and_said_if_it_never_comes():
    constant = ("--lr_scheduler_type", "constant_with_warmup", "--num_train_epochs", "10")
    assert plan(*constant).lr_drop_step is None
    dropping = plan(*constant, "--lr_drop_epoch", "7")
    assert dropping.lr_drop_step == 7 * 125
    assert "a tenth of it from step 875" in dropping.describe()
    assert any("the learning rate never drops" in note for note in plan(*constant, "--lr_drop_epoch", "10").notes)


def test_refinement__of_random_weights_is_noted():
    assert any("give --init_from" in note for note in plan("--method", "refine").notes)
    assert not any("--init_from" in note for note in plan("--method", "dino").notes)


def test_warmup__on_the_command_line_is_kept_as_far_as_there_are_steps():
    assert plan("--max_steps", "1000", "--warmup_epochs", "4").warmup_steps == 500
    assert plan("--max_steps", "100", "--warmup_epochs", "4").warmup_steps == 100
    assert plan("--max_steps", "100", "--warmup_steps", "60").warmup_steps == 60
    assert plan("--max_steps", "100", "--warmup_steps", "0.2").warmup_steps == 20
    assert plan("--max_steps", "100", "--warmup_steps", "0").warmup_steps == 0
    assert plan("--warmup_epochs", "0").warmup_steps == 0


# ---- device ----


def test_precision__is_bfloat16_where_the_gpu_has_it_and_on_a_cpu_when_asked():
    assert plan(hardware=GPU).precision == "bfloat16"
    assert plan(hardware=Hardware("cuda", 16)).precision == "float32"
    assert plan("--bf16", "false", hardware=GPU).precision == "float32"
    assert plan().precision == "float32"
    asked = plan("--bf16").training_arguments()
    assert (asked["bf16"], asked["use_cpu"]) == (True, True)
    half = plan("--fp16", hardware=GPU).training_arguments()
    assert (half["bf16"], half["fp16"]) == (False, True)


def test_precision__asked_for_and_not_there_is_an_error():
    with pytest.raises(ValueError, match="use --fp16, or --bf16 false"):
        plan("--bf16", hardware=Hardware("cuda", 16))


@pytest.mark.parametrize(
    ("hardware", "workers"),
    [
        (Hardware("cpu", 1), 0),
        (Hardware("cpu", 2), 0),
        (Hardware("cpu", 4), 3),
        (Hardware("cpu", 64), 4),
        (Hardware("cpu", 4, world_size=2, num_local_processes=2), 0),
        (Hardware("cuda", 8), 8),
        (Hardware("cuda", 96, world_size=16, num_local_processes=8), 12),
        (Hardware("cuda", 96), 16),
    ],
)
def test_workers__follow_the_cores_of_each_process(hardware, workers):
    arguments = plan(hardware=hardware).training_arguments()
    assert arguments["dataloader_num_workers"] == workers
    assert arguments["dataloader_persistent_workers"] is (workers > 0)


def test_workers__given_are_kept():
    assert plan("--dataloader_num_workers", "2").training_arguments()["dataloader_num_workers"] == 2


# ---- mask, memory, folder ----


def test_mask__counts_what_is_hidden():
    assert plan().num_masked == (147, 147)
    assert plan("--mask_ratio", "0.5", "0.75").num_masked == (98, 147)
    units = plan("--mask_strategy", "random-unit", "--mask_unit", "32", "--mask_ratio", "0.6")
    assert units.num_masked == (120, 120)  # 30 of 49 cells of 4, as SimMIM
    assert plan("--image_size", "160", "224").grid == (10, 14)


def test_memory__is_near_to_what_was_measured_for_vit_base():
    # Bytes that autograd keeps for an image of MAE ViT-B/16, counted by saved_tensors_hooks: 83.6 MB, 52.7 MB in bf16.
    exact = plan_of_real_model()
    assert exact.bytes_for_activations == pytest.approx(83.6e6, rel=0.05)
    assert plan_of_real_model("--bf16").bytes_for_activations == pytest.approx(52.7e6, rel=0.05)
    num_fixed = 197 * 768  # the table of positions
    assert exact.bytes_for_weights == 16 * (exact.footprint.num_parameters - num_fixed) + 4 * num_fixed


def test_memory__is_near_to_what_was_measured_for_simmim():
    # The same count for the whole head: Swin-T at 192 pixels 77.0 MB (51.4 in bf16), ViT-S/16 at 224 78.0 MB.
    swin = ("--method", "simmim", "--model", "swin-tiny")
    assert plan_of_real_model(*swin).bytes_for_activations == pytest.approx(77.0e6, rel=0.1)
    assert plan_of_real_model(*swin, "--bf16").bytes_for_activations == pytest.approx(51.4e6, rel=0.1)
    vit = plan_of_real_model("--method", "simmim", "--model", "vit-small")
    assert vit.bytes_for_activations == pytest.approx(78.0e6, rel=0.1)


def test_output_folder__is_named_after_model_method_and_data():
    assert str(plan().output_dir) == "outputs/vit-base-mae-sample"
    assert str(plan("--dataset", "../my photos (2024)/").output_dir) == "outputs/vit-base-mae-my-photos-2024"
    assert str(plan("--dataset", "ILSVRC/imagenet-1k").output_dir) == "outputs/vit-base-mae-imagenet-1k"
    assert str(plan("--output_dir", "here").output_dir) == "here"


# ---- what is handed on and said ----


@pytest.mark.parametrize("steps", ["1", "3", "100"])
def test_short_runs__do_not_save_at_every_step_unless_asked_to(steps):
    arguments = plan("--max_steps", steps).training_arguments()
    assert arguments["eval_steps"] == arguments["save_steps"] == 20  # Trainer does both at the end in any case
    assert plan("--max_steps", steps, "--save_steps", "0.001").training_arguments()["save_steps"] == 1


def test_intervals__below_one_are_shares_and_above_are_kept():
    arguments = plan("--max_steps", "1000", "--save_steps", "7").training_arguments()
    assert (arguments["eval_steps"], arguments["save_steps"]) == (50, 7)


def test_training_arguments__are_accepted_by_transformers(tmp_path):
    wanted = plan("--output_dir", str(tmp_path), "--max_steps", "30", "--warmup_epochs", "1", images=80)
    arguments = TrainingArguments(**wanted.training_arguments())
    assert arguments.get_warmup_steps(30) == 10
    assert (arguments.max_steps, arguments.learning_rate) == (30, 1.5e-4 * 8 / 256)
    assert arguments.device.type == "cpu"


def test_as_recipe__gives_the_same_numbers_again(tmp_path):
    first = plan("--weight_decay", "0.1", images=50, hardware=GPU)
    recipe = tmp_path / "resolved.yaml"
    recipe.write_text(yaml.safe_dump(first.as_recipe()), encoding="utf-8")
    again = plan("--config", str(recipe), images=50, hardware=GPU)
    assert again.training_arguments() == first.training_arguments()
    assert first.num_steps == 2000  # raised from 800: the recipe says so outright
    assert again.notes == ()


def test_describe__shows_the_arithmetic():
    text = plan("--config", "mae_vit-base_in1k", images=1_281_167, hardware=gpus(8)).describe()
    assert "256 x 8 processes x 2 accumulation = 4,096" in text
    assert "1.5e-4 x 4,096 / 256 = 2.4e-3" in text
    assert "500,800 = 1,600 x 313 per epoch" in text
    assert "14 x 14 = 196 patches of 16 x 16" in text
    assert "147 of 196 patches masked" in text
    assert "12,520 steps" in text
    assert "111.9 million parameters" in text
    assert len(text.splitlines()) <= 16
    assert "note:" not in text


def test_describe__says_every_reduction_in_a_line_of_its_own():
    few = plan("--gradient_accumulation_steps", "8", images=3, validation=0)
    noted = [line for line in few.describe().splitlines() if line.startswith("note: ")]
    assert len(noted) == len(few.notes) == 4


def test_arithmetic__of_mae_is_that_of_its_matrix_products():
    def blocks(number: int, tokens: int, width: int) -> int:
        projections, attention = 12 * width**2 * tokens, 2 * tokens**2 * width
        return number * (projections + attention)

    visible, patches, patch_values = 49, 196, 768
    products = (
        visible * patch_values * 768
        + blocks(12, 1 + visible, 768)
        + (1 + visible) * 768 * 512
        + blocks(8, 1 + patches, 512)
        + patches * 512 * patch_values
    )
    assert plan_of_real_model("--model", "vit-base").footprint.flops_per_image == 3 * 2 * products


def test_arithmetic__of_a_teacher_is_that_of_its_forward_pass():
    class StudentAndTeacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)

        def forward(self, pixel_values):
            with torch.no_grad():
                targets = self.teacher(pixel_values)
            return self.student(pixel_values) - targets

    with torch.device("meta"):
        footprint = measure_footprint(StudentAndTeacher(), {"pixel_values": torch.empty(1, 8)})
    assert footprint.flops_per_image == (3 + 1) * 2 * 8 * 16


@pytest.mark.parametrize(
    ("method", "mask"),
    [
        ("mae", "random, 147 of 196 patches masked"),
        ("ibot", "block, 20 to 96 of 196 patches masked, in 50% of the crops"),
        ("dino", "none"),
        ("simdino", "none"),
    ],
)
def test_mask__is_that_of_the_method(method, mask):
    assert plan("--method", method).task_rows()["mask"] == mask


def test_color_jitter__is_refused_by_methods_with_their_own_colors():
    settings = load_pretraining_settings(["--method", "dino", "--color_jitter", "0.2"], CONFIGS)
    with pytest.raises(ValueError, match="--color_jitter has no effect with dino"):
        transform_of(settings, CONFIGS["dino"](), None, train=True)


def test_plan__counts_the_texts_and_pairs_of_a_step():
    tokens = TextTokens(train_text_tokenizer(["a dog"], 300), 64)

    def flops(*flags: str) -> int:
        settings = load_pretraining_settings(["--method", "beit3", "--model", "vit-nano", *flags], CONFIGS)
        settings_of_texts = {"text_config": tokens.config, "num_fusion_layers": 0} if flags else {}
        method_settings = {**settings.method_settings, **settings_of_texts}
        config = CONFIGS["beit3"](encoder_config=settings.encoder_settings(), **method_settings)
        texts = TextSplits(tokens, (None, None), None, BadImages(), ()) if flags else None
        collator = build_collator(settings, config, texts)
        return run_pretraining.model_footprint(settings, config, collator).flops_per_image

    images, with_texts = flops(), flops("--text_dataset", "texts")
    with_pairs = flops("--text_dataset", "texts", "--pair_dataset", "pairs")
    assert with_texts > 1.2 * images
    assert with_pairs > with_texts + 1.2 * images
