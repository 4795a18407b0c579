"""Batches: what they hold, which masks belong to which image, and mistakes named where they are made."""

import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data.collators import MaskingCollator
from data.masks import block_mask, random_mask
from data.sampling import EpochSampler
from data.seeds import seeded_generator

GRID = (4, 6)


def make_item(image_index: int, epoch: int = 0, step: int = 0, size: tuple[int, int, int] = (3, 8, 12)) -> dict:
    return {
        "pixel_values": torch.full(size, image_index % 256, dtype=torch.uint8),
        "image_index": image_index,
        "epoch": epoch,
        "step": step,
    }


def make_bare_items(num_images: int) -> list[dict]:
    return [{"pixel_values": make_item(index)["pixel_values"]} for index in range(num_images)]


class Images(Dataset):
    """Counter -> item of one image, or of its pixels only."""

    def __init__(self, num_images: int, bare: bool = False) -> None:
        self.num_images, self.bare = num_images, bare

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, counter: int) -> dict:
        epoch, image_index = divmod(counter, self.num_images)
        item = make_item(image_index, epoch, step=counter // 4)
        return {"pixel_values": item["pixel_values"]} if self.bare else item


def masks_by_image(batches: list[dict]) -> dict[int, list[bool]]:
    rows = ((b["image_index"], b["bool_masked_pos"]) for b in batches)
    return {int(i): mask.tolist() for indices, masks in rows for i, mask in zip(indices, masks, strict=True)}


def test_batch__holds_stacked_uint8_images_and_one_mask_each():
    batch = MaskingCollator(GRID, 0.75)([make_item(3), make_item(250)])
    assert set(batch) == {"pixel_values", "bool_masked_pos", "num_masked_patches"}
    assert batch["num_masked_patches"] == int(batch["bool_masked_pos"].sum())
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (2, 3, 8, 12)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 250]
    assert batch["bool_masked_pos"].dtype == torch.bool
    assert batch["bool_masked_pos"].sum(1).tolist() == [18, 18]


def test_batch__holds_image_indices_when_asked():
    batch = MaskingCollator(GRID, 0.75, with_image_index=True)([make_item(7), make_item(2)])
    assert batch["image_index"].tolist() == [7, 2]
    assert batch["image_index"].dtype == torch.int64


def test_mask__depends_on_seed_epoch_and_image_only():
    collate = MaskingCollator(GRID, 0.75, seed=3)
    alone = collate([make_item(5, epoch=2, step=9)])["bool_masked_pos"][0]
    in_company = collate([make_item(1, epoch=2, step=8), make_item(5, epoch=2, step=8)])["bool_masked_pos"][1]
    assert alone.equal(in_company)
    assert alone.equal(random_mask(GRID, 0.75, seeded_generator(3, "mask", 2, 5)))
    for other in (make_item(6, epoch=2), make_item(5, epoch=3)):
        assert not alone.equal(collate([other])["bool_masked_pos"][0])
    assert not alone.equal(MaskingCollator(GRID, 0.75, seed=4)([make_item(5, epoch=2)])["bool_masked_pos"][0])


@pytest.mark.parametrize(("strategy", "mask_ratio"), [("random", (0.3, 0.9)), ("block", 0.4), ("random-unit", 0.5)])
def test_masks__are_the_same_for_every_worker_count_batch_size_and_evaluation(strategy, mask_ratio):
    def evaluate(num_workers: int, batch_size: int) -> dict[int, list[bool]]:
        collate = MaskingCollator(GRID, mask_ratio, strategy, equal_num_masked=False, with_image_index=True)
        loader = DataLoader(Images(12), batch_size, num_workers=num_workers, collate_fn=collate)
        first, second = masks_by_image(list(loader)), masks_by_image(list(loader))
        assert first == second
        return first

    reference = evaluate(num_workers=0, batch_size=12)
    assert len({str(mask) for mask in reference.values()}) == 12
    assert evaluate(num_workers=2, batch_size=3) == reference


def test_ratio_range__is_drawn_once_per_step_where_counts_must_be_equal():
    collate = MaskingCollator((14, 14), (0.3, 0.9), equal_num_masked=True)
    counts = []
    for step in range(300):
        masks = collate([make_item(4 * step + i, step=step) for i in range(4)])["bool_masked_pos"]
        assert masks.sum(1).unique().numel() == 1
        counts.append(int(masks[0].sum()))
    assert min(counts) >= 59  # 196 * 0.3 = 58.8
    assert max(counts) <= 177  # 196 - int(196 * 0.1) = 177
    assert sum(counts) / len(counts) / 196 == pytest.approx(0.6, abs=0.04)  # standard error 0.01
    assert len(set(counts)) > 60
    other_rank = collate([make_item(99_999, step=7)])["bool_masked_pos"]
    assert int(other_rank.sum()) == counts[7]


def test_ratio_range__is_drawn_per_image_where_counts_may_differ():
    collate = MaskingCollator((14, 14), (0.3, 0.9), equal_num_masked=False)
    counts = collate([make_item(i) for i in range(300)])["bool_masked_pos"].sum(1)
    assert counts.float().mean().item() / 196 == pytest.approx(0.6, abs=0.04)
    assert counts.min() < 75
    assert counts.max() > 160


@pytest.mark.filterwarnings("ignore:The items lack")
def test_bare_items__get_masks_that_differ_by_image_call_rank_and_seed(monkeypatch):
    def draw(seed: int = 0, rank: str = "0") -> list[list[bool]]:
        monkeypatch.setenv("RANK", rank)
        collate = MaskingCollator((14, 14), 0.75, seed=seed)
        return [mask for _ in range(2) for mask in collate(make_bare_items(2))["bool_masked_pos"].tolist()]

    masks = [*draw(), *draw(seed=1), *draw(rank="1")]
    assert len({str(mask) for mask in masks}) == 12
    assert draw() == draw()


@pytest.mark.filterwarnings("ignore:The items lack")
def test_bare_items__get_new_masks_in_each_worker_and_each_epoch():
    collate = MaskingCollator((14, 14), (0.5, 0.9))
    loader = DataLoader(Images(8, bare=True), 2, num_workers=2, collate_fn=collate)
    masks = [mask for _ in range(2) for batch in loader for mask in batch["bool_masked_pos"].tolist()]
    assert len({str(mask) for mask in masks}) == 16


def test_bare_items__are_warned_about_once():
    collate = MaskingCollator(GRID, 0.75)
    with pytest.warns(UserWarning, match="image_index.*remove_unused_columns=False"):
        collate(make_bare_items(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate(make_bare_items(2))


def test_images_in_a_worker__are_stacked_into_shared_memory_once():
    loader = DataLoader(Images(4), 4, num_workers=1, collate_fn=SharedMemoryProbe(MaskingCollator(GRID, 0.75)))
    assert next(iter(loader))["was_shared"]


class SharedMemoryProbe:
    def __init__(self, collate: MaskingCollator) -> None:
        self.collate = collate

    def __call__(self, features: list[dict]) -> dict:
        return {"was_shared": self.collate(features)["pixel_values"].is_shared()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "blocks"}, "'blocks'. Known: random, random-unit, block"),
        (
            {"strategy": "block"},
            "'block' .* equal .*: random, random-unit, exact-block, inverse-block, visible-blocks, grid",
        ),
        ({"mask_unit": 2}, "mask_unit 2 has no effect with the strategy 'random'"),
        ({"strategy": "random-unit", "mask_unit": 4}, r"4x6 .* 4x4 .*\[1, 2\]"),
        ({"mask_ratio": 1.0}, "between 0 and 1, .* 1.0"),
        ({"mask_ratio": 0.0}, "between 0 and 1, .* 0.0"),
        ({"mask_ratio": 75.0}, "between 0 and 1, .* 75.0"),
        ({"mask_ratio": float("nan")}, "between 0 and 1, .* nan"),
        ({"mask_ratio": (0.9, 0.5)}, r"lowest first, got \(0\.9, 0\.5\)"),
        ({"mask_ratio": (0.5, 0.6, 0.7)}, r"\(lowest, highest\), got \(0\.5, 0\.6, 0\.7\)"),
        ({"mask_ratio": 0.99}, "0.99 masks 24 of 24 patches"),
        ({"mask_ratio": (0.5, 0.99)}, "0.99 masks 24 of 24 patches"),
        ({"mask_ratio": (0.01, 0.5), "strategy": "exact-block"}, "0.01 masks 0 of 24 patches"),
        ({"mask_ratio": 0.5, "strategy": "grid"}, "0.5 does not give a regular grid on 4x6"),
        ({"mask_ratio": (0.7, 0.8), "strategy": "grid"}, "'grid' has only a few ratios"),
        ({"mask_probability": 1.1}, "mask_probability must be from 0 to 1, got 1.1"),
        ({"mask_probability": 0.5}, r"mask_probability 0.5 masks a different number .* \(equal_num_masked\)"),
        ({"spreads_ratios": True}, r"spreads_ratios masks a different number .* \(equal_num_masked\)"),
        ({"grid": (0, 6)}, r"positive, got \(0, 6\)"),
        ({"grid": (4, 6, 3)}, r"got \(4, 6, 3\)"),
    ],
)
def test_collator__refuses_wrong_settings_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskingCollator(**{"grid": GRID, "mask_ratio": 0.75, **arguments})


def test_collator__names_the_item_that_is_wrong():
    collate = MaskingCollator(GRID, 0.75, with_image_index=True)
    with pytest.raises(ValueError, match=r"item 1 .* no 'pixel_values', only \['image'\]"):
        collate([make_item(0), {"image": torch.zeros(3, 8, 12)}])
    with pytest.raises(ValueError, match=r"item 1 .*image_index 9.* \(1, 8, 12\), but item 0 .* \(3, 8, 12\)"):
        collate([make_item(0), make_item(9, size=(1, 8, 12))])
    with (
        pytest.warns(UserWarning, match="lack"),
        pytest.raises(ValueError, match="item 0 of the batch has no 'image_index'"),
    ):
        collate(make_bare_items(1))


def test_collator__can_be_sent_to_a_spawned_worker():
    collate = MaskingCollator(GRID, 0.5, "random-unit", mask_unit=2)
    copy = pickle.loads(pickle.dumps(collate))
    items = [make_item(1), make_item(2)]
    assert copy == collate
    assert copy(items)["bool_masked_pos"].equal(collate(items)["bool_masked_pos"])


def test_epoch_sampler__never_repeats_a_counter_across_epochs():
    sampler = EpochSampler(5)
    assert len(sampler) == 5
    assert list(sampler) == [0, 1, 2, 3, 4]
    sampler.set_epoch(3)
    assert list(sampler) == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_epoch_sampler__reaches_persistent_workers(persistent_workers):
    sampler = EpochSampler(8)
    collate = MaskingCollator((14, 14), 0.75, with_image_index=True)
    loader = DataLoader(
        Images(8), 4, sampler=sampler, num_workers=1, persistent_workers=persistent_workers, collate_fn=collate
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for image_index, mask in masks_by_image(list(loader)).items():
            assert mask == random_mask((14, 14), 0.75, seeded_generator(0, "mask", epoch, image_index)).tolist()


def test_prediction_ratio__chooses_among_the_masked_and_changes_no_mask():
    items = [make_item(index, epoch=1) for index in range(6)]
    whole = MaskingCollator(GRID, 0.75)(items)
    part = MaskingCollator(GRID, 0.75, prediction_ratio=1 / 3)(items)
    assert "bool_predicted_pos" not in whole
    assert part["bool_masked_pos"].equal(whole["bool_masked_pos"])
    assert part["num_masked_patches"] == whole["num_masked_patches"]
    assert part["bool_predicted_pos"].sum(1).tolist() == [6] * 6
    assert part["num_predicted_patches"] == 36
    assert not (part["bool_predicted_pos"] & ~part["bool_masked_pos"]).any()
    again = MaskingCollator(GRID, 0.75, prediction_ratio=1 / 3)(items[2:3])
    assert again["bool_predicted_pos"][0].equal(part["bool_predicted_pos"][2])
    chosen = {tuple(row.nonzero().flatten().tolist()) for row in part["bool_predicted_pos"]}
    assert len(chosen) == 6


def test_prediction_ratio__is_at_least_one_patch_and_never_none():
    batch = MaskingCollator((2, 2), 0.5, prediction_ratio=0.01, num_masks=2)([make_item(0), make_item(1)])
    assert batch["bool_predicted_pos"].sum(-1).tolist() == [[1, 1], [1, 1]]
    for ratio in (0, 1.5):
        with pytest.raises(ValueError, match="prediction_ratio must be above 0"):
            MaskingCollator(GRID, 0.75, prediction_ratio=ratio)


def test_image_size__other_sizes_get_patches_of_the_same_size():
    collate = MaskingCollator(GRID, 0.75, image_size=(32, 48))
    for size, num_patches in (((3, 32, 48), 24), ((3, 16, 24), 6), ((3, 64, 48), 48)):
        batch = collate([make_item(3, size=size)])
        assert batch["bool_masked_pos"].shape == (1, num_patches)
        rows, columns = size[1] // 8, size[2] // 8
        expected = random_mask((rows, columns), 0.75, seeded_generator(0, "mask", 0, 3))
        assert batch["bool_masked_pos"][0].equal(expected)


def test_collator__draws_a_mask_for_each_crop_of_an_image():
    collator = MaskingCollator((8, 8), 0.5, seed=3)
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    item = {"pixel_values": pixels, "epoch": 2, "step": 5, "image_index": 7}
    first, second, third = collator([item, {**item, "crop": 1}, {**item, "crop": 2}])["bool_masked_pos"]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert torch.equal(collator([{**item, "crop": 2}, item])["bool_masked_pos"], torch.stack([third, first]))
    pairs = MaskingCollator((8, 8), 0.5, seed=3, num_masks=2)  # as with views of two crops
    views = {**item, "pixel_values": pixels.expand(2, -1, -1, -1)}
    masks = pairs([views, {**views, "crop": 1}])["bool_masked_pos"]
    assert masks.shape == (2, 2, 64)
    assert len({tuple(mask.tolist()) for mask in masks.flatten(0, 1)}) == 4
    assert torch.equal(masks[0, 0], first)


def test_mask_probability__leaves_images_without_a_mask_and_is_drawn_before_the_ratio():
    collate = MaskingCollator((8, 8), (0.1, 0.5), "block", equal_num_masked=False, num_masks=2, mask_probability=0.5)
    items = [make_item(index, epoch=3) for index in range(300)]
    batch = collate(items)
    masks = batch["bool_masked_pos"].flatten(0, 1)
    masked = masks[masks.any(1)]
    assert len(masked) / len(masks) == pytest.approx(0.5, abs=0.08)  # standard error 0.02
    assert masked.sum(1).max() > 28
    assert masked.sum(1).min() < 10
    assert batch["num_masked_patches"] == int(masks.sum())
    assert collate(items[7:8])["bool_masked_pos"][0].equal(batch["bool_masked_pos"][7])
    for index in range(8):
        generator = seeded_generator(0, "mask", 3, index)
        is_masked = torch.rand((), generator=generator) < 0.5
        expected = block_mask((8, 8), 0.1 + 0.4 * torch.rand((), generator=generator).item(), generator)
        assert batch["bool_masked_pos"][index, 0].equal(expected & is_masked)


def test_mask_probability__of_zero_masks_nothing():
    batch = MaskingCollator(GRID, 0.5, equal_num_masked=False, prediction_ratio=0.5, mask_probability=0.0)(
        [make_item(0), make_item(1)]
    )
    assert batch["num_masked_patches"] == batch["num_predicted_patches"] == 0
    assert batch["bool_predicted_pos"].shape == (2, 24)


@pytest.mark.parametrize("num_images", [1, 5, 16])
def test_spread_ratios__are_one_from_each_bin_of_the_range(num_images):
    settings = {"equal_num_masked": False, "num_masks": 2, "mask_probability": 0.5, "spreads_ratios": True}
    collate = MaskingCollator((32, 32), (0.1, 0.5), **settings)
    orders = set()
    for epoch in range(3):
        items = [make_item(index, epoch, step=epoch) for index in range(num_images)]
        masks = collate(items)["bool_masked_pos"].flatten(0, 1)
        ratios = masks.float().mean(1)
        assert len(ratios[ratios > 0]) == num_images
        bins = ((ratios[ratios > 0].sort().values - 0.1) / (0.4 / num_images)).tolist()
        assert all(number - 0.1 < place < number + 1.1 for number, place in enumerate(bins))
        orders.add(tuple(ratios.argsort().tolist()))
        again = MaskingCollator((32, 32), (0.1, 0.5), **settings)(items)["bool_masked_pos"].flatten(0, 1)
        assert again.equal(masks)  # whatever came before, as after a resume
    assert len(orders) > 1 or num_images == 1


@pytest.mark.filterwarnings("ignore:The items lack")
def test_spread_ratios__of_bare_items_differ_by_call():
    collate = MaskingCollator((8, 8), (0.1, 0.9), equal_num_masked=False, mask_probability=0.5, spreads_ratios=True)
    first, second = (collate(make_bare_items(6))["bool_masked_pos"] for _ in range(2))
    assert first.any(1).sum() == second.any(1).sum() == 3
    assert not first.equal(second)
