"""The SLURM script under imitations of `srun` and `scontrol`: after a signal the job queues again, and continues."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forked import run_forked
from safetensors.torch import load_file

SCRIPT, TRAIN = ROOT / "recipes" / "slurm.sbatch", ROOT / "tests" / "train_and_die.py"
# Each task in a group of its own, as SLURM signals every process of a task. Like the real one, it ends with the
# highest exit code.
SRUN = """#!/bin/bash
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank setsid "$@" &
    tasks+=($!)
done
highest=0
for task in "${tasks[@]}"; do
    wait $task
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo 127.0.0.1; echo second ;;
    *) echo "$@" >> "$CALLS" ;;
esac
"""


def submit(folder: Path, num_tasks: int, *words: object) -> subprocess.CompletedProcess:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_NTASKS": str(num_tasks), "CALLS": str(folder / "calls"), "PYTHON": sys.executable}
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", SCRIPT, *map(str, words)], env=os.environ | job | own, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [1, 2])
def test_job__that_gets_a_signal_queues_again_and_ends_with_the_weights_of_an_undisturbed_one(tmp_path, num_tasks):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    undisturbed = run_forked([TRAIN, tmp_path / "whole"], environment, num_processes=num_tasks)
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    command = [TRAIN, tmp_path / "out", "--signal_at", "6 SIGUSR1 group", "--resume"]
    first = submit(tmp_path, num_tasks, *command)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "is queued again" in first.stdout
    assert "stopped by SIGUSR1 at step" in first.stderr
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert not (tmp_path / "out" / "final.safetensors").exists()
    second = submit(tmp_path, num_tasks, *command)
    assert second.returncode == 0, second.stderr[-2000:]
    assert (tmp_path / "calls").read_text().count("requeue") == 1
    expected, continued = (load_file(tmp_path / name / "final.safetensors") for name in ("whole", "out"))
    assert expected.keys() == continued.keys()
    assert all(torch.equal(continued[name], value) for name, value in expected.items())


def test_job__that_fails_ends_with_its_exit_code_and_does_not_queue_again(tmp_path):
    result = submit(tmp_path, 2, "-c", "import os, sys; sys.exit(2 if os.environ['RANK'] == '1' else 0)")
    assert result.returncode == 2
    assert not (tmp_path / "calls").exists()


def test_job__gives_each_task_its_rank(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    code = f"import os; os.write(1, ' '.join([os.environ[n] for n in {names}] + ['\\n']).encode())"
    result = submit(tmp_path, 2, "-c", code)
    assert sorted(result.stdout.splitlines()) == ["0 0 2 2 127.0.0.1 ", "1 1 2 2 127.0.0.1 "]
