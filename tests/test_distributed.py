"""One process, four, and two computers of two give the same losses, and the same file of features.

The slow test starts them with `torchrun`.
"""

import json
import os
import shutil
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, tiny_model
from forked import Forked, run_forked

from benchmarks.distributed import METHODS, TOLERANCE, WORLDS, largest_difference, launch
from hub.export.native import export

WORKER = ROOT / "benchmarks" / "distributed.py"


def losses_of(folder: Path, num_computers: int, num_processes: int) -> dict[str, list[float]]:
    """Train three steps in a world whose processes have the environment that `torchrun` would give them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    world_size = num_computers * num_processes
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(num_processes), "OMP_NUM_THREADS": "1"}
    file = folder / f"{num_computers}x{num_processes}.json"
    processes = [
        Forked(
            [WORKER, "--worker", file, "--num_steps", "3"],
            os.environ | address | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank % num_processes)},
        )
        for rank in range(world_size)
    ]
    for process in processes:
        assert process.wait() == 0, process.communicate()[1][-3000:]
    written = json.loads(file.read_text())
    assert written["world_size"] == world_size
    return written["losses"]


def test_two_computers_of_two_processes__have_the_losses_of_one_process(tmp_path):
    alone, together = losses_of(tmp_path, 1, 1), losses_of(tmp_path, 2, 2)
    for method in METHODS:
        assert len(together[method]) == 3
        assert largest_difference(together[method], alone[method]) < TOLERANCE, method


def test_embed__on_two_processes_writes_the_file_of_one(tmp_path):
    """With an image that cannot be read and batches that do not divide evenly."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in list((ROOT / "data/samples/photographs/train").glob("*.jpg"))[:10]:
        shutil.copy(path, folder)
    (folder / "bad.jpg").write_bytes(b"no image")
    export(tiny_model("mae"), tmp_path / "encoder", method="mae", recipe={})
    words = ["--model", tmp_path / "encoder", "--dataset", folder, "--use_cpu", "--per_device_eval_batch_size", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for num_processes, name in ((None, "one"), (2, "two")):
        command = [ROOT / "run_evaluation.py", *words, "--embed", tmp_path / f"{name}.parquet"]
        result = run_forked(command, environment, num_processes=num_processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "features of 10 images" in result.stdout
        assert result.stdout.count("bad.jpg") == 1
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert two.schema.equals(one.schema, check_metadata=True)
    assert two.equals(one)
    assert not list(tmp_path.glob("*.part*"))
    refused = run_forked([ROOT / "run_evaluation.py", *words], environment, num_processes=2)
    assert refused.returncode == 2
    assert refused.stderr.count("2 processes were started: only --embed shares its work") == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_losses__of_50_steps_are_those_of_one_process_however_they_are_started(tmp_path):
    worlds = {name: launch(name, 50, tmp_path) for name in WORLDS}
    for name, losses in worlds.items():
        for method in METHODS:
            assert len(losses[method]) == 50
            assert largest_difference(losses[method], worlds["1 x 1"][method]) < TOLERANCE, f"{name} {method}"
