"""Python programs in processes of their own, forked from one that has imported the libraries and nothing of ours.

A fresh interpreter spends eight seconds on these imports. Where its start, a launcher or the absence of an import is a
part of what is tested, `subprocess` starts it.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context
from pathlib import Path
from subprocess import CompletedProcess

HERE = Path(__file__).parent
_CONTEXT = get_context("forkserver")
_LIBRARIES = ["accelerate", "datasets", "matplotlib.figure", "evaluate", "pytest", "safetensors.torch"]
_LIBRARIES += ["torch.distributed.tensor", "transformers.trainer", "transformers.models.vit_mae.modeling_vit_mae"]
_LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("beit", "deit", "dinov2", "swin", "vit")]
_CONTEXT.set_forkserver_preload(_LIBRARIES)


class Forked:
    """What `subprocess.Popen` would be for `python WORDS` in a group of its own; its output is kept in files."""

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self._streams = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
        pipes = [connection.Connection(os.dup(stream.fileno()), readable=False) for stream in self._streams]
        environment = dict(os.environ if environment is None else environment)
        arguments = (list(map(str, words)), environment, str(cwd or Path.cwd()), *pipes)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        for pipe in pipes:
            pipe.close()
        self.sentinel = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 180) -> int:
        """Return the exit code, which is -N after signal N."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"the process did not end in {timeout} s and was killed; {self.communicate()}")
        return self.returncode

    def communicate(self, timeout: float = 180) -> tuple[str, str]:
        """Return its standard output and its standard error."""
        self.wait(timeout)
        for stream in self._streams:
            stream.seek(0)
        output, errors = (stream.read() for stream in self._streams)
        return output, errors


def run_forked(
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    num_processes: int | None = None,
) -> CompletedProcess[str]:
    """Run `python WORDS` to its end, or that many processes that torchrun would start for `num_processes`.

    Returns:
        The exit code of the first process that failed, or 0, and what all of them wrote.
    """
    environment = dict(os.environ if environment is None else environment)
    environments = [environment]
    if num_processes is not None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        world |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
        ranks = [dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(num_processes)]
        environments = [environment | world | rank for rank in ranks]
    processes = [Forked(words, environment, cwd) for environment in environments]
    running, returncode = processes, 0
    while running:
        connection.wait([process.sentinel for process in running])
        returncode = returncode or next((code for p in running if (code := p.returncode)), 0)
        running = [process for process in running if process.returncode is None]
        for process in running if returncode else ():
            process.kill()
    outputs, errors = zip(*(process.communicate() for process in processes), strict=True)
    return CompletedProcess(words, returncode, "".join(outputs), "".join(errors))


def _run(
    words: list[str],
    environment: dict[str, str],
    cwd: str,
    stdout: connection.Connection,
    stderr: connection.Connection,
) -> None:
    """Make this process one of `python WORDS`."""
    multiprocessing.set_start_method(None, force=True)  # of data workers: the platform's
    gc.freeze()  # what was imported, so that no collection of garbage looks at it
    atexit._clear()  # what the libraries registered in the process that this one was forked from
    os.setsid()
    for pipe, number in ((stdout, 1), (stderr, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    kind, *rest = words
    own = {"-c": "", "-m": cwd}.get(kind, str(Path(kind).resolve().parent))
    added = [own, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = added + [entry for entry in sys.path if entry not in ("", str(HERE), str(HERE.parent))]
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
