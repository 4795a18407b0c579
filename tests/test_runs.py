"""Runs of neighboring images, and the order that reads whole runs: every image once, and little memory."""

import numpy as np

from data.runs import Runs, cut_into_runs, split_runs
from data.sampling import RUNS_PER_WINDOW, EpochOrder


def test_order__has_every_image_once_and_reads_neighbors_together() -> None:
    sizes = np.array([7, 1, 5, 9] * 40)
    order = EpochOrder(int(sizes.sum()), 0, 8, run_sizes=sizes)
    epochs = [[order.locate(epoch * 880 + position)[0] for position in range(880)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(880))
    assert epochs[0] != epochs[1]
    run_of = np.repeat(np.arange(160), sizes)
    assert len(set(run_of[epochs[0][:160]])) <= RUNS_PER_WINDOW
    fresh = EpochOrder(880, 0, 8, run_sizes=sizes)
    assert [fresh.locate(counter)[0] for counter in (1759, 3, 880)] == [epochs[1][-1], epochs[0][3], epochs[1][0]]


def test_announcement__names_the_runs_of_the_next_window_once() -> None:
    sizes = np.full(RUNS_PER_WINDOW * 2, 3)
    order = EpochOrder(len(sizes) * 3, 0, 8, run_sizes=sizes)
    half = len(sizes) * 3 // 2
    for begin, counter in ((half, 0), (2 * half, half)):
        images = order.announce(counter)
        wanted = {order.locate(begin + position)[0] // 3 for position in range(half)}
        assert {image // 3 for image in images} == wanted
        assert order.announce(counter + 1) == []


def test_runs__behave_like_their_array() -> None:
    runs = Runs(np.array([5, 20, 9]), np.array([3, 1, 2]))
    wanted = [5, 6, 7, 20, 9, 10]
    assert list(runs) == np.asarray(runs).tolist() == [runs[i] for i in range(6)] == wanted
    assert runs[np.array([3, 0])].tolist() == [20, 5]
    assert runs[1:4].tolist() == wanted[1:4]


def test_split__of_a_hundred_million_images_needs_little_memory() -> None:
    runs = cut_into_runs(np.full(100_000, 1000))
    train, validation = split_runs(runs, 0.01, 0)
    assert (len(train), len(validation)) == (99_000_000, 1_000_000)
    assert train.starts.nbytes + train.sizes.nbytes < 2e6
    order = EpochOrder(len(train), 0, 256, run_sizes=train.sizes)
    assert len({order.locate(position)[0] for position in range(0, 90_000_000, 9_000_000)}) == 10
