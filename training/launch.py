"""What a launcher leaves behind that a training run should not inherit."""

import os

import torch


def restore_threads() -> str | None:
    """Give a CPU run its cores back; returns what to tell the user, or None.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 where the user set nothing, which halves the speed on two
    cores already.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    wanted = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1" or torch.get_num_threads() >= wanted:
        return None
    torch.set_num_threads(wanted)
    return f"the launcher left one thread (OMP_NUM_THREADS=1): using {wanted} of {cores} cores"


def has_accelerator() -> bool:
    """Whether torch sees any device other than the CPU."""
    return torch.accelerator.is_available()


def check_world(world_size: int) -> None:
    """Refuse to run as several independent jobs that write into one folder.

    Raises:
        ValueError: the launcher started more processes than the trainer joined.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world_size:
        raise ValueError(
            f"the launcher started {started} processes, but the trainer sees {world_size}: each would train on its "
            "own and write into the same folder; add --use_cpu on machines without a GPU, or start one process"
        )
