# ruff: noqa: E402
"""Compare the losses of one process with those of several: `make distributed`, or `python -m benchmarks.distributed`.

Four tiny models of the tests train with the same images, eight in each step, on one process, on four, on two computers
of two processes (two `torchrun` on this one), and with FSDP2 on two. Sums in another order change the last digit of a
gradient, and every step magnifies that; the largest relative difference of any loss must stay below `TOLERANCE`.
Writes benchmarks/distributed_<hardware>_<date>.json and .md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import argparse
import json
import os
import socket
import subprocess
import tempfile
from typing import Any

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report

METHODS = ("mae", "simmim", "beit", "data2vec")
# Name -> computers, processes on each, and whether FSDP2 shards the model.
WORLDS = {"1 x 1": (1, 1, False), "1 x 4": (1, 4, False), "2 x 2": (2, 2, False), "FSDP2, 1 x 2": (1, 2, True)}
TOLERANCE = 1e-5


def train(file: Path, num_steps: int, sharded: bool) -> None:
    """Train all models on this process of a world, and write their losses."""
    from train_sharded import make_trainer

    losses = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            changes: dict[str, Any] = {"max_steps": num_steps, "save_strategy": "no", "eval_strategy": "no"}
            trainer = make_trainer(Path(folder), method, sharded, **changes, max_grad_norm=1.0)
            trainer.train()
        losses[method] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        file.write_text(json.dumps({"world_size": trainer.args.world_size, "losses": losses}), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def launch(name: str, num_steps: int, folder: Path) -> dict[str, Any]:
    """Start the processes of a world and return their losses by method."""
    num_computers, num_processes, sharded = WORLDS[name]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    file = folder / f"{name}.json"
    own = ["-m", "benchmarks.distributed", "--worker", str(file), "--num_steps", str(num_steps)]
    words = [*own, *(["--sharded"] if sharded else [])]
    launchers = []
    for rank in range(num_computers):
        nodes = ["--nnodes", str(num_computers), "--node_rank", str(rank), "--nproc_per_node", str(num_processes)]
        address = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        start = ["-m", "torch.distributed.run", *nodes, *address] if num_computers * num_processes > 1 else []
        launchers.append(subprocess.Popen([sys.executable, *start, *words], cwd=ROOT, stdout=sys.stderr))
    if any([launcher.wait() for launcher in launchers]):
        sys.exit(f"{name} failed")
    written: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert written["world_size"] == num_computers * num_processes
    losses: dict[str, Any] = written["losses"]
    return losses


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of any step."""
    return max(abs(loss - other) / abs(other) for loss, other in zip(losses, expected, strict=True))


def markdown(report: dict[str, Any]) -> str:
    losses, alone = report["losses"], report["losses"]["1 x 1"]
    names = [name for name in WORLDS if name != "1 x 1"]
    lines = [
        "# The same losses on any number of processes",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}: `{report['command']}`",
        "",
        f"Tiny models on bundled photographs, {report['num_steps']} steps of 8 images, AdamW with an epsilon of "
        "1e-3, clipping, moving averages, float32, gloo; with FSDP2 the blocks are computed twice (gradient "
        "checkpointing). 2 x 2 are two computers of two processes (here two `torchrun` on one). Right: the largest "
        f"relative difference of the loss of any step from that of one process; up to {TOLERANCE:g} is allowed.",
        "",
        f"| | first and last loss on one process | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for method in METHODS:
        differences = [f"{largest_difference(losses[name][method], alone[method]):.1e}" for name in names]
        lines.append(f"| {method} | {alone[method][0]:.4f} {alone[method][-1]:.4f} | {' | '.join(differences)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=50, help="of each model (default: 50)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the report")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        train(arguments.worker, arguments.num_steps, arguments.sharded)
        sys.stdout.flush()
        os._exit(0)  # several trainers leave gloo threads that abort an orderly end now and then
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: launch(name, arguments.num_steps, Path(folder)) for name in WORLDS}
    report = {
        **{"date": TODAY, "hardware": hardware(), "command": command("distributed"), "losses": losses},
        **{"versions": versions("torch", "transformers", "accelerate"), "num_steps": arguments.num_steps},
    }
    text = markdown(report)
    write_report(arguments.output / f"distributed_{hardware_slug()}_{TODAY}", report, text)
    print(text)
    alone = losses["1 x 1"]
    return int(any(largest_difference(world[m], alone[m]) > TOLERANCE for world in losses.values() for m in METHODS))


if __name__ == "__main__":
    sys.exit(main())
