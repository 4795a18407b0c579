"""One run at a time in an output folder, and what a killed run leaves is no obstacle."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import ROOT

from commands.output_folder import check_output_dir
from commands.run_lock import LOCK_FILE, locked

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from commands.run_lock import locked

with locked(Path(sys.argv[1])):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()  # a data worker
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another_process(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout.readline() == b"locked\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_lock__keeps_others_out_until_its_process_is_killed(tmp_path):
    with held_by_another_process(tmp_path) as holder:
        message = rf"in use by another run \(process {holder.pid} on .*, since .*\): wait, stop it"
        with pytest.raises(ValueError, match=message), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK_FILE).exists()
        with locked(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_lock__is_released_by_an_error_and_leaves_no_new_folder(tmp_path):
    with pytest.raises(OSError, match="full"), locked(tmp_path / "out"):
        raise OSError("full")
    assert not (tmp_path / "out").exists()


def test_lock__is_left_out_where_the_file_system_has_none(tmp_path, monkeypatch):
    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_lock__of_a_file_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    lock, lockf, removed = tmp_path / LOCK_FILE, fcntl.lockf, []

    def remove_then_lock(file, *arguments):
        if not removed:
            removed.append(lock.unlink())
        lockf(file, *arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_then_lock)
    with locked(tmp_path):
        assert lock.exists()


def test_output_dir__that_cannot_be_made_or_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError, match="give another --output_dir"):
            check_output_dir(folder)
    check_output_dir(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="change the permissions or give another --output_dir"):
        check_output_dir(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
