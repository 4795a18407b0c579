from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from modeling.self_distillation import (
    Center,
    PrototypeHead,
    agreement_loss,
    class_token_loss,
    clip_each_,
    coding_rate,
    koleo_loss,
    patch_loss,
    sinkhorn_knopp,
)

GOLDEN = Path(__file__).parent / "golden" / "ibot_loss.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def by_image(rows: torch.Tensor, num_crops: int) -> torch.Tensor:
    """(crops * B, ...), as the authors concatenate crops -> (B, crops, ...)."""
    return rows.unflatten(0, (num_crops, -1)).transpose(0, 1)


def centered(golden: dict[str, torch.Tensor], kind: str) -> Center:
    center = Center(golden[f"{kind}_before"].shape[-1])
    center.mean.copy_(golden[f"{kind}_before"].flatten())
    return center


def test_class_token_loss__is_the_authors(golden):
    center, logits = centered(golden, "center"), golden["teacher_cls"]
    teacher = by_image(center(logits, golden["teacher_temp"].item()), 2)
    student = torch.cat([by_image(golden["student_cls"], 2), by_image(golden["student_local_cls"], 3)], dim=1)
    assert_close(class_token_loss(student, teacher, 0.1), golden["loss_cls"][0], rtol=1e-5, atol=0)


def test_patch_loss__is_the_authors(golden):
    masks = torch.stack([golden["mask_0"], golden["mask_1"]], dim=1).flatten(0, 1).flatten(1)  # (R, N)
    assert not masks.any(dim=1).all()  # a crop without masked patches counts too
    student, teacher = (by_image(golden[f"{who}_patch"], 2).flatten(0, 2) for who in ("student", "teacher"))
    masked = masks.flatten().nonzero().squeeze(1)
    targets = centered(golden, "center2")(teacher[masked], golden["teacher_patch_temp"].item())
    assert_close(patch_loss(student[masked], targets, 0.1, masks, masked), golden["loss_patch"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "rows"), [("center", "teacher_cls"), ("center2", "teacher_patch")])
def test_center__moves_as_the_authors(golden, kind, rows):
    center, logits = centered(golden, kind), golden[rows].flatten(0, -2)
    for part in logits.split([3, len(logits) - 3]):  # two micro-batches
        center.add(part.mean(dim=0), len(part))
    assert_close(center.mean, golden[f"{kind}_before"].flatten(), rtol=0, atol=0)  # during the step it stays
    center.update()
    assert_close(center.mean, golden[f"{kind}_after"].flatten(), rtol=1e-5, atol=1e-7)
    center.update()
    assert_close(center.mean, golden[f"{kind}_after"].flatten(), rtol=1e-5, atol=1e-7)


def test_center__stays_without_tokens():
    center = Center(4)
    center.mean.fill_(0.5)
    center.add(torch.full((4,), float("nan")), 0)
    center.update()
    assert torch.equal(center.mean, torch.full((4,), 0.5))


def test_sinkhorn_knopp__alternates_rows_and_columns():
    logits = np.random.default_rng(0).normal(size=(12, 5))
    q = np.exp(logits / 0.5).T  # (K, n), as in the authors' code
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * 5
        q /= q.sum(axis=0, keepdims=True) * 12
    found = sinkhorn_knopp(torch.from_numpy(logits).float(), 0.5)
    assert_close(found, torch.from_numpy((q * 12).T).float(), rtol=1e-5, atol=1e-7)


def test_sinkhorn_knopp__spreads_what_softmax_gives_to_one_prototype():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    logits[:, 3] += 1
    assert (logits / 0.05).softmax(dim=1).mean(dim=0)[3] > 0.9
    assert sinkhorn_knopp(logits, 0.05).mean(dim=0)[3] < 0.25
    assert torch.isfinite(sinkhorn_knopp(1e4 * logits, 0.05)).all()
    assert sinkhorn_knopp(logits[:0], 0.05).shape == (0, 8)


def test_koleo_loss__is_the_mean_log_distance_to_the_nearest():
    features = np.random.default_rng(1).normal(size=(6, 4))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + 10 * np.eye(6)
    expected = -np.log(distances.min(axis=1)).mean()
    assert koleo_loss(torch.from_numpy(features)).item() == pytest.approx(expected, rel=1e-5)


def test_coding_rate__is_the_log_determinant_of_the_papers():
    views = np.random.default_rng(2).normal(size=(6, 2, 4))
    rates = []
    for view in views.transpose(1, 0, 2):
        covariance = np.eye(4) + 4 / (6 * 0.05) * view.T @ view
        rates.append(0.5 * np.linalg.slogdet(covariance)[1] * (4 + 6) / (4 * 6))
    assert coding_rate(torch.from_numpy(views), 0.05).item() == pytest.approx(np.mean(rates), rel=1e-5)
    assert coding_rate(torch.ones(6, 2, 4), 0.05) < coding_rate(torch.from_numpy(views), 0.05)


def test_agreement_loss__leaves_out_a_crop_with_itself():
    student, teacher = torch.eye(3)[None], torch.eye(3)[None, :2]  # three different crops
    assert agreement_loss(student, teacher) == 0
    assert agreement_loss(torch.ones(1, 3, 1), torch.ones(1, 2, 1)) == -1


def test_clip_each__limits_every_tensor_by_itself():
    large, small, unused = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    large.grad, small.grad = torch.full((4,), 50.0), torch.full((4,), 0.5)
    clip_each_([large, small, unused], 3.0)
    assert large.grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(small.grad, torch.full((4,), 0.5))


def test_prototype_head__compares_directions():
    head = PrototypeHead(16, 32, 8, 24)
    head.init_weights()
    tokens = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    logits = head(tokens)
    assert logits.shape == (5, 24)
    assert logits.abs().max() <= 1 + 1e-5
    with torch.no_grad():
        head.prototypes.mul_(7)
    assert_close(head(tokens), logits)
    assert "scale" not in dict(head.named_parameters())
    assert "scale" in dict(PrototypeHead(16, 32, 8, 24, trains_scale=True).named_parameters())


@pytest.mark.parametrize("aligned", [0.0, 0.99])
def test_losses__are_computed_in_float32_under_autocast(aligned):
    """In half precision the Gram matrix of features that are nearly equal is not positive definite."""
    generator = torch.Generator().manual_seed(0)
    features = (1 - aligned) * torch.randn(64, 2, 256, generator=generator) + aligned
    features = nn.functional.normalize(features, dim=-1)
    teacher = (features / 0.04).softmax(dim=-1)
    losses = (
        lambda: coding_rate(features, 0.05),
        lambda: koleo_loss(features[:, 0]),
        lambda: class_token_loss(features, teacher, 0.1),
    )
    for loss in losses:
        expected = loss()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss()
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
