"""A process that is killed, hangs or loses its network ends the others, with one message."""

import os
import socket

import pytest
import torch
from conftest import ROOT
from forked import Forked

from training import lost_process
from training.lost_process import is_about_lost_process, is_first_to_report

SCRIPT = ROOT / "tests" / "lose_process.py"


@pytest.mark.parametrize(
    ("rank", "signal", "who"),
    [
        pytest.param(
            1, "SIGKILL", "run_pretraining.py: another process of this run has ended", marks=pytest.mark.slow
        ),
        pytest.param(
            1, "SIGSTOP", f"process 1 (on {socket.gethostname()}) has not answered for 3 s", marks=pytest.mark.slow
        ),
        (0, "SIGSTOP", "the first process, or its computer, has not answered for 3 s"),
        pytest.param(0, "SIGKILL", "another process of this run has ended", marks=pytest.mark.slow),
    ],
)
def test_lost_process__ends_the_other_with_one_message_that_names_the_checkpoint(tmp_path, rank, signal, who):
    with socket.create_server(("127.0.0.1", 0)) as server:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    world |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        Forked([SCRIPT, tmp_path, rank, signal], os.environ | world | {"RANK": str(each), "LOCAL_RANK": str(each)})
        for each in (0, 1)
    ]
    survivor = processes[1 - rank]
    try:
        _, errors = survivor.communicate(timeout=120)
    finally:
        processes[rank].kill()
    assert survivor.returncode == 4
    lines = [line for line in errors.splitlines() if "this run" in line]
    assert len(lines) == 1
    assert who in lines[0] or (rank == 0 and "cannot be reached" in lines[0])
    assert "Traceback" not in errors
    if signal == "SIGSTOP":
        assert f"{tmp_path / 'checkpoint-4'} is complete: the same command continues from there" in lines[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclRemoteError: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionError("Connection reset by peer"), False),  # of a Hub or a storage
    ],
)
def test_error__about_a_lost_process_is_recognized(error, expected):
    assert is_about_lost_process(error) == expected


def test_report__is_made_by_the_process_that_is_first(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(lost_process, "_store", lambda: store)
    assert [is_first_to_report() for _ in range(3)] == [True, False, False]
