"""The refinement: neighbors, their queue, the loss against the authors' loops, and the frozen encoder at first."""

import pytest
import torch
from conftest import TINY_MODELS, tiny_arguments, tiny_batch, tiny_collator, tiny_images, tiny_model
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from modeling.refine import NeighborQueue, RefineConfig, neighbor_loss
from training.trainer import MimTrainer


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss__is_that_of_the_authors_loops():
    """nnclr_loss.py of ml-jku/MIM-Refiner, but for the index of local crops: neighbors do not replace negatives."""
    keys, neighbors, predictions = unit(3, 2, 4), unit(3, 2, 4, seed=1), unit(3, 5, 4, seed=2)
    terms = []
    for key in range(2):
        for crop in range(5):
            if crop != key:
                swapped = neighbors[:, key] @ predictions[:, crop].T / 0.2
                logits = torch.where(torch.eye(3) == 1, swapped, keys[:, key] @ predictions[:, crop].T / 0.2)
                terms.append(cross_entropy(logits, torch.arange(3)))
    assert_close(neighbor_loss(keys, neighbors, predictions, 0.2), torch.stack(terms).mean())


def test_queue__keeps_the_last_images_and_no_image_is_its_own_neighbor():
    queue = NeighborQueue(4, 8)
    queue.init_weights()
    rows = unit(6, 8)
    queue.add(rows[:3], torch.arange(3))
    assert (queue.image_index == -1).all()  # until the optimizer step is done
    queue.update()
    queue.add(rows[3:], torch.arange(3, 6))
    queue.update()
    assert sorted(queue.image_index.tolist()) == [2, 3, 4, 5]
    assert queue.position == 2
    keys = rows[:, None]
    assert_close(queue.nearest(keys, None, 1)[2:], keys[2:])  # without numbers, each finds itself
    found = queue.nearest(keys, torch.arange(6), 1)
    similarity = (rows @ rows.T).fill_diagonal_(-2)
    similarity[:, :2] = -2  # replaced
    assert_close(found[:, 0], rows[similarity.argmax(1)])


def test_queue__draws_among_candidates_in_training_only():
    queue = NeighborQueue(32, 8)
    queue.init_weights()
    keys = unit(16, 2, 8)
    nearest = queue.eval().nearest(keys, None, 5)
    assert torch.equal(nearest, queue.nearest(keys, None, 1))
    assert not torch.equal(nearest, queue.train().nearest(keys, None, 5))


@torch.no_grad()
def test_evaluation__numbers_of_its_images_exclude_no_training_image():
    model, batch = tiny_model("refine"), tiny_batch("refine")
    numbers = torch.arange(8)
    model.train()(**batch, image_index=numbers)
    for head in model.heads:
        head.queue.update()
    alone = model.eval()(**batch).loss
    assert torch.equal(model(**batch, image_index=numbers).loss, alone)


def test_queues__get_the_numbers_of_images_from_the_trainer(tmp_path):
    model = tiny_model("refine")
    MimTrainer(
        model=model,
        args=tiny_arguments(tmp_path, max_steps=2),
        train_dataset=tiny_images(variant="refine"),
        data_collator=tiny_collator("refine", with_image_index=True),
    ).train()
    assert [sum(head.queue.image_index >= 0) for head in model.heads] == [16, 16]


def test_settings__follow_from_the_encoder_and_the_number_of_images():
    assert [RefineConfig.settings_for(number) for number in (30, 218, 10**6)] == [
        {"queue_size": size} for size in (64, 128, 65_536)
    ]
    config = RefineConfig(encoder_config={"num_hidden_layers": 24}, queue_size=128)
    assert (config.num_refined_blocks, config.num_candidates) == (8, 3)
    assert RefineConfig().num_candidates == 20
    for wrong in ({"num_refined_blocks": 3}, {"num_candidates": 65}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RefineConfig(**{**TINY_MODELS["refine"], **wrong})
