"""iBOT, DINO and DINOv2 against loops as in the authors' code, and what their teacher and schedules promise."""

import math

import pytest
import torch
from conftest import model_class, tiny_arguments, tiny_batch, tiny_collator, tiny_config, tiny_images, tiny_model
from torch.testing import assert_close

from modeling.dinov2 import Dinov2Config
from modeling.ibot import IbotConfig, IbotForPreTraining
from modeling.schedules import Progress
from training.collapse import WatchForCollapse
from training.trainer import MimTrainer

METHODS = ("ibot", "dino", "dinov2")


def moved(method: str) -> IbotForPreTraining:
    """A model whose student and teacher differ, and whose centers are not zero."""
    model = tiny_model(method)
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in (*model.encoder.parameters(), *model.heads.parameters(), *model.centers.buffers()):
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("method", ["ibot", "dino"])
def test_losses__equal_the_authors_loops_over_pairs_of_crops(method):
    model, batch = moved(method), tiny_batch(method)
    crops, masks = model.standardize(batch["pixel_values"]), batch["bool_masked_pos"]
    local = model.standardize(batch["local_pixel_values"])
    head, teacher_head = model.heads["class_token"], model.teacher_heads["class_token"]
    student = [model.encoder.tokens(crops[:, v], masks[:, v] if method == "ibot" else None) for v in (0, 1)]
    teacher = [model.teacher.tokens(crops[:, v]) for v in (0, 1)]
    students = [head(s[:, 0]) for s in student] + [head(model.encoder.tokens(local[:, v])[:, 0]) for v in (0, 1)]
    class_terms, patch_terms = [], []
    for q in (0, 1):
        p = ((teacher_head(teacher[q][:, 0]) - model.centers["class_token"].mean) / 0.05).softmax(-1)
        class_terms += [-(p * (s / 0.1).log_softmax(-1)).sum(-1).mean() for v, s in enumerate(students) if v != q]
        if method == "ibot":
            p = ((teacher_head(teacher[q][:, 1:]) - model.centers["patch"].mean) / 0.05).softmax(-1)
            per_token = -(p * (head(student[q][:, 1:]) / 0.1).log_softmax(-1)).sum(-1)
            mask = masks[:, q].float()
            patch_terms.append(((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean())
    output = model(**batch, teacher_temperature=0.05)
    assert len(class_terms) == 2 * 3
    assert_close(output.losses["class_token"], torch.stack(class_terms).mean(), rtol=1e-5, atol=1e-6)
    if method == "ibot":
        assert (masks.sum(-1) == 0).any()  # some crops are whole, and count
        assert_close(output.losses["patch"], torch.stack(patch_terms).mean(), rtol=1e-5, atol=1e-6)
    assert_close(output.loss, sum(output.losses.values()))


@torch.no_grad()
def test_dinov2__adds_koleo_of_both_views_with_its_weight():
    model, batch = moved("dinov2"), tiny_batch("dinov2")
    output = model(**batch)
    assert set(output.losses) == {"class_token", "patch", "koleo"}
    without = output.losses["class_token"] + output.losses["patch"]
    assert_close(output.loss, without + 0.1 * output.losses["koleo"])


def test_coding_rate__keeps_images_apart_in_the_first_10_000_steps():
    model, batch = moved("ibot+attention"), tiny_batch("ibot+attention")
    schedule = model.schedules(500_000, 100)["coding_rate_weight"]
    assert [schedule.at(step) for step in (0, 5_000, 10_000, 400_000)] == [1, 0.5, 0, 0]
    assert "coding_rate" not in model(**batch).losses
    loss = model(**batch, coding_rate_weight=0.5).losses["coding_rate"]
    head, crops = model.heads["class_token"], model.standardize(batch["pixel_values"])
    loss.backward()
    assert head.mlp[0].weight.grad.abs().sum() > 0
    alike = crops[:1].expand_as(crops)
    closer = model(**batch | {"pixel_values": alike}, coding_rate_weight=0.5).losses["coding_rate"]
    assert closer > loss  # the rate of equal images is lower
    assert "coding_rate_weight" not in moved("ibot").schedules(500_000, 100)  # 0, as published
    assert model.training_loss_label == "training loss, with the coding rate"
    assert moved("ibot").training_loss_label == "training loss"


@torch.no_grad()
def test_batch_without_masks__has_a_patch_loss_of_zero():
    model, batch = moved("ibot"), tiny_batch("ibot")
    batch |= {"bool_masked_pos": torch.zeros_like(batch["bool_masked_pos"]), "num_masked_patches": 0}
    assert model(**batch).losses["patch"] == 0
    assert model(**{name: batch[name] for name in batch if name != "num_masked_patches"}).losses["patch"] == 0


def test_losses__can_be_left_out():
    with pytest.raises(ValueError, match="both 0"):
        tiny_config("dino").__class__(class_token_loss_weight=0.0)
    with pytest.raises(ValueError, match="the patch loss needs masks"):
        IbotConfig(mask_probability=0.0)
    sizes = {"encoder_config": tiny_config("ibot").encoder_config.to_dict(), "num_prototypes": 8}
    patches_only = IbotForPreTraining(IbotConfig(**sizes, class_token_loss_weight=0.0))
    assert [view.name for view in patches_only.config.views] == ["pixel_values"]
    assert set(patches_only.heads) == set(patches_only.centers) == {"patch"}
    assert tiny_model("dino").encoder.embeddings.mask_token is None


def test_views__have_local_crops_of_three_sevenths():
    views = IbotConfig(encoder_config={"image_size": 224, "patch_size": 16}).views
    assert [(view.num_crops, view.image_size) for view in views] == [(2, None), (10, (96, 96))]
    assert IbotConfig(encoder_config={"image_size": (96, 192), "patch_size": 8}).views[1].image_size == (40, 80)
    assert views[0].photometric.blur_probability == (1.0, 0.1)
    assert views[0].photometric.solarize_probability == (0.0, 0.2)


@pytest.mark.parametrize(("image_size", "largest"), [(448, 2.0), (224, 2.0), (56, 0.5), ((56, 112), 0.5)])
def test_views__blur_small_images_as_much_as_224_pixels(image_size, largest):
    views = IbotConfig(encoder_config={"image_size": image_size, "patch_size": 8}).views
    assert [view.photometric.blur_radius for view in views] == [(largest / 20, largest)] * 2


@pytest.mark.parametrize("method", METHODS)
def test_step__moves_teacher_and_centers_once_and_keeps_prototypes_at_first(method, tmp_path):
    model = tiny_model(method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = MimTrainer(
        model=model,
        args=tiny_arguments(
            tmp_path, max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-2
        ),
        train_dataset=tiny_images(variant=method),
        data_collator=tiny_collator(method, with_image_index=True),
    )
    seen = []
    after_step = model.after_step

    def record(progress: Progress) -> None:
        student, teacher = (model.get_submodule(name).state_dict() for name in ("encoder", "teacher"))
        old = {name: tensor.clone() for name, tensor in teacher.items()}
        centers = {name: center.mean.clone() for name, center in model.centers.items()}
        after_step(progress)
        momentum = progress.values["teacher_momentum"]
        for name, tensor in model.teacher.state_dict().items():
            assert_close(tensor, old[name].lerp(student[name], 1 - momentum))
        for name, center in model.centers.items():
            assert not torch.equal(center.mean, centers[name])
        seen.append(
            (progress.step, torch.equal(model.heads["class_token"].prototypes, before["heads.class_token.prototypes"]))
        )

    model.after_step = record
    trainer.train()
    assert [step for step, _ in seen] == list(range(12))
    assert [kept for _, kept in seen] == [True, True, *10 * [False]]  # a tenth of twelve steps, rounded up
    entry = next(entry for entry in trainer.state.log_history if entry.get("step") == 12)
    assert 0 < entry["class_token_entropy"] <= entry["class_token_spread"] + 1e-6 <= 1 + 1e-5
    assert entry["weight_decay"] > 0.3 if method != "dinov2" else True


@pytest.mark.parametrize("method", METHODS)
def test_teacher__is_computed_in_float32_under_autocast(method):
    model, batch = moved(method), tiny_batch(method)
    crops = model.standardize(batch["pixel_values"]).flatten(0, 1)
    masks = batch["bool_masked_pos"].flatten(0, 1)
    masked = masks.flatten().nonzero().squeeze(1)
    expected = model.teacher_targets(crops, masks, masked, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.teacher_targets(crops, masks, masked, 0.07)
        assert torch.isfinite(model(**batch).loss)
    for name, distributions in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], distributions)


def test_schedules__are_the_published_ones_where_given_and_else_follow_the_run():
    config = tiny_config("ibot")
    model = tiny_model("ibot")
    found = model.schedules(num_steps=1000, steps_per_epoch=100)
    assert found["teacher_temperature"].at(0) == 0.04
    assert found["teacher_temperature"].at(1000) == pytest.approx(0.0408)
    assert found["teacher_temperature"].at(37_500) == 0.07
    assert found["teacher_momentum"].at(0) == pytest.approx(0.95)
    assert found["teacher_momentum"].at(1000) == 1.0
    assert model.schedules(20, 10)["teacher_momentum"].at(0) == pytest.approx(0.9)
    assert model.schedules(1_000_000, 1250)["teacher_momentum"].at(0) == 0.996
    config.teacher_temperature_warmup_epochs = 30.0
    published = IbotForPreTraining(config).schedules(1_000_000, 1250)
    assert published["teacher_temperature"].at(30 * 1250 - 1) < 0.07 == published["teacher_temperature"].at(30 * 1250)
    assert published["weight_decay"].at(500_000) == pytest.approx(0.22)


@pytest.mark.parametrize(("num_images", "expected"), [(200, 64), (5_000, 256), (60_000, 4096), (1_281_167, 8192)])
def test_prototypes__are_fewer_for_fewer_images(num_images, expected):
    assert IbotConfig.settings_for(num_images) == {"num_prototypes": expected}
    assert IbotConfig().num_prototypes == 8192


def test_dinov2__has_registers_and_uniform_drop_path():
    config = Dinov2Config(encoder_config={"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 2})
    assert (config.encoder_config.mlp_ratio, config.encoder_config.num_register_tokens) == (4, 4)
    assert config.encoder_config.drop_path_rate == 0.3
    assert Dinov2Config(num_register_tokens=0).encoder_config.num_register_tokens == 0


@pytest.mark.parametrize(
    ("entropy", "spread", "says"),
    [(0.99, 0.995, "uniform over"), (0.05, 0.06, "in the same few of 24"), (0.3, 0.9, None), (0.05, 0.5, None)],
)
def test_collapse_signs__compare_single_distributions_with_their_mean(entropy, spread, says):
    found = tiny_model("ibot").collapse_signs({"class_token_entropy": entropy, "class_token_spread": spread})
    assert found is None if says is None else says in found


@pytest.mark.parametrize(
    ("method", "settings", "collapses"),
    [
        ("dino", {"teacher_temperature": 0.2, "teacher_temperature_start": 0.2, "center_momentum": 1.0}, True),
        ("dino", {"teacher_momentum_start": 0.5}, True),
        ("ibot", {"teacher_momentum_start": 0.996}, False),
    ],
    ids=["flat and not centered", "a teacher that forgets", "healthy"],
)
def test_collapse__is_named_within_two_evaluations(method, settings, collapses, tmp_path, capsys):
    config = tiny_config(method)
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    trainer = MimTrainer(
        model=model_class(method)(config),
        args=tiny_arguments(
            tmp_path, max_steps=30, learning_rate=1e-3 if collapses else 3e-4, eval_strategy="steps", eval_steps=15
        ),
        train_dataset=tiny_images(variant=method),
        eval_dataset=tiny_images(train=False, variant=method, num_images=32),
        data_collator=tiny_collator(method, with_image_index=True),
    )
    trainer.add_callback(WatchForCollapse(trainer))
    trainer.train()
    assert ("distributions for all images are nearly equal" in capsys.readouterr().err) == collapses


def test_entropies__are_shares_of_the_largest():
    model = tiny_model("ibot")
    uniform = torch.full((25,), 8 / 24)
    uniform[-1] = 8.0
    logs = model.summarize_metrics(
        {"class_token_entropy": torch.tensor([8 * math.log(24) / 2, 8.0]), "class_token_marginal": uniform}
    )
    assert logs == {"class_token_entropy": pytest.approx(0.5), "class_token_spread": pytest.approx(1.0)}
    assert model.describe_metrics(logs) == ["teacher entropy 50%, of the mean 100%"]
