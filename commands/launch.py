"""Start and end of a command: processes, threads, output of the main process, and error messages."""

import errno
import os
import platform
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

import huggingface_hub
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from commands.arithmetic import Hardware
from commands.parsing import SettingsError
from data.image_checks import num_cores
from data.shard_blocks import limit_cache
from training.callbacks import duration
from training.collapse import CollapseError
from training.guard import NonFiniteError
from training.lost_process import is_about_lost_process, is_first_to_report
from training.stopping import Stopped, raising_stopped

_OPEN_FILES, _FEWEST_OPEN_FILES = 65536, 256
_MORE_FILES = "raise the limit with `ulimit -n 65536`, or lower `dataloader_num_workers`"
_ADVICE = {
    errno.ENOSPC: "; free some space on this disk",
    errno.EDQUOT: "; free some space, or ask for a larger quota",
    errno.EMFILE: f"; {_MORE_FILES}",
}
# What torch reports when data workers fail, and the message for it.
_FAULTS_OF_WORKERS = {
    r"Too many open files|ancdata": f"too many open files: {_MORE_FILES}",
    r"torch_\d+.*(?:No space left|Cannot allocate)|signal: Bus error": (
        "the data workers have no shared memory left: enlarge /dev/shm (docker run --shm-size 8g), or lower "
        "`dataloader_num_workers`; 0 needs none"
    ),
    r"signal: Killed": "a data worker was killed, probably because memory ran out: lower `dataloader_num_workers`",
    r"timed out after (\d+) seconds": "no images arrived for {} seconds: is the storage still available?",
}


def run(argv: list[str], main: Callable[[list[str]], None], build_parser: Callable[[], ArgumentParser]) -> int:
    """Run a command and return its exit code; what a user can repair is one message instead of a traceback.

    The codes: 2 for a mistake in the command or the data, 3 for a loss that is not finite, 4 for a fault of the system
    (disk, memory, a lost process), 5 for a model that collapsed, 130, 143, 129 and 138 for a run that SIGINT (Ctrl-C),
    SIGTERM, SIGHUP or SIGUSR1 stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names need not be Unicode
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    wants_traceback = "--debug" in argv
    if not wants_traceback:
        transformers.utils.logging.set_verbosity_error()
        huggingface_hub.utils.logging.set_verbosity_error()
    try:
        with raising_stopped(
            "before the run was complete; the same command continues from its last checkpoint, if any"
        ):
            main(argv)
    except (Exception, Stopped) as error:
        exit_code, message = _describe_failure(error)
        if wants_traceback or not exit_code:
            raise
        if is_first_to_report():
            parser = build_parser()
            if not isinstance(error, SettingsError):  # which names flags, or lines of a recipe
                message = with_flags(message, {action.dest: action.dest for action in parser._actions})
            print("; ".join([f"{parser.prog}: {message}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return exit_code
    finally:
        if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads sometimes abort it
            torch.distributed.destroy_process_group()
    return 0


def _describe_failure(error: Exception | Stopped) -> tuple[int, str]:
    """Return the exit code and a message, or 0 for an error of ours, whose traceback is needed."""
    if isinstance(error, Stopped):
        return error.exit_code, str(error)
    for kind, exit_code in ((ValueError, 2), (NonFiniteError, 3), (CollapseError, 5)):
        if isinstance(error, kind):
            return exit_code, _without_worker(error)
    fault = _system_fault(error)
    return (0, "") if fault is None else (4, fault)


def _system_fault(error: BaseException) -> str | None:
    """Return what the operating system refused, or None if the error is another one."""
    text = _without_worker(error)
    numbers = re.search(r"(?:os error|\[[Ee]rrno) (\d+)", text)  # of safetensors, pyarrow and data workers
    number = getattr(error, "errno", None) or (int(numbers[1]) if numbers else 0)
    if isinstance(error, OSError):
        name = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or text}{name}{_ADVICE.get(number, '')}"
    if is_about_lost_process(error):
        return "another process of this run has ended, or its computer cannot be reached"
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device is out of memory: lower `per_device_train_batch_size` ({str(error).partition('. ')[0]})"
    for pattern, message in _FAULTS_OF_WORKERS.items():
        if isinstance(error, RuntimeError) and (found := re.search(pattern, text)):
            return message.format(*found.groups())
    if number:
        return f"{os.strerror(number)}{_ADVICE.get(number, '')}"
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return "a checkpoint could not be written; is the disk full?"
    return None


def _without_worker(error: BaseException) -> str:
    """Return the message of an error, without the traceback that torch adds to an error of a data worker."""
    text = str(error)
    if " in DataLoader worker process " not in text.partition("\n")[0]:
        return text
    return text.rpartition(f"{type(error).__name__}: ")[2].strip()


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace names of arguments in messages of the library, which knows no flags, by the flags that set them.

    A name counts if it is in backticks, or has an underscore and stands alone: "`model`" and "mask_ratio", but neither
    "model", which may be an ordinary word, nor "mask_ratio.txt".
    """
    named = re.compile(r"`([a-z0-9_]+)`|(?<![-\w./'\"])([a-z0-9]+_[a-z0-9_]+)(?![-\w/'\"]|\.\w)")
    return named.sub(
        lambda match: f"--{flags[name]}" if (name := match[1] or match[2]) in flags else match[0], message
    )


@contextmanager
def set_by(**flags: str) -> Iterator[None]:
    """Name the flags that set arguments of another name: `set_by(label_column="eval_label_column")`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(with_flags(str(error), flags)) from error


def join(use_cpu: bool) -> tuple[PartialState, Callable[[str], None]]:
    """Return the state of this run's processes on their device, and a function that prints on the main process."""
    _allow_open_files()
    use_cpu = use_cpu or not has_accelerator()
    state = PartialState(cpu=use_cpu)
    check_world(state.num_processes)
    log = printer(state)
    if (note := restore_threads()) and use_cpu:
        log(f"note: {note}")
    return state, log


def _allow_open_files() -> None:
    """Raise the limit of open files as far as the user may, because each waiting batch of a data worker needs some.

    Raises:
        OSError: If too few are left; torch would lose batches of workers, and wait for them for ever.
    """
    if resource is None:
        return
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    if resource.RLIM_INFINITY != limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    if wanted < _FEWEST_OPEN_FILES:
        raise OSError(
            errno.EMFILE, f"only {wanted} files may be open at once, at least {_FEWEST_OPEN_FILES} are needed"
        )


def printer(state: PartialState) -> Callable[[str], None]:
    """Return a function that prints on the main process only."""
    return lambda text: print(text, flush=True) if state.is_main_process else None


def first_on_main(state: PartialState, work: Callable[[], Any]) -> Any:
    """Run `work` on the main process and return its result, or raise its ValueError or OSError, on all processes."""
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def limit_shard_cache(settings: Any) -> None:
    """Apply --shard_cache_gb to the shards that are opened from now on."""
    limit_cache(int(settings.shard_cache_gb * 1e9))


def find_hardware(state: PartialState) -> Hardware:
    has_bf16 = state.device.type == "cuda" and torch.cuda.is_bf16_supported()
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Hardware(state.device.type, num_cores(), state.num_processes, num_local_processes, has_bf16)


def launcher() -> list[str]:
    """Return the words that started this process on the command line."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return ["accelerate", "launch"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return ["python"]


def software_and_hardware(trainer: Trainer) -> dict[str, str]:
    """Return the rows of a model card about versions, devices and training time."""
    device = trainer.args.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    seconds = [entry["training_seconds"] for entry in trainer.state.log_history if "training_seconds" in entry]
    return {
        **{package: version(package) for package in ("transformers", "torch", "accelerate", "datasets")},
        "python": platform.python_version(),
        "hardware": f"{trainer.args.world_size} x {name}",
        **({"training time": duration(seconds[-1])} if seconds else {}),
    }


def restore_threads() -> str | None:
    """Use all cores of a run on the CPU; returns a note if the number of threads changed.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 unless the user sets it, which halves the speed on two
    cores.
    """
    cores = num_cores()
    wanted = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    is_users = launcher() == ["python"] or "OMP_NUM_THREADS" in launcher_environment()
    if is_users or os.environ.get("OMP_NUM_THREADS") != "1" or torch.get_num_threads() >= wanted:
        return None
    torch.set_num_threads(wanted)
    return f"the launcher left one thread (OMP_NUM_THREADS=1): using {wanted} of {cores} cores"


def launcher_environment() -> dict[str, str]:
    """Return the variables that the launcher found, before it set its own; empty where they cannot be read."""
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes()  # Linux
    except OSError:
        return {}
    return dict(os.fsdecode(entry).partition("=")[::2] for entry in variables.split(b"\0") if entry)


def has_accelerator() -> bool:
    """Return whether torch finds a device other than the CPU."""
    return torch.accelerator.is_available()


def check_world(world_size: int) -> None:
    """Raise ValueError if the launcher's processes would run as independent jobs with one output folder."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != world_size:
        raise ValueError(
            f"the launcher started {started} processes, but the trainer sees {world_size}: each would train on its "
            "own and write to the same folder; add --use_cpu on a computer without a GPU, or start one process"
        )
