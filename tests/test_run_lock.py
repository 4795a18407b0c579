"""One run at a time in an output folder, and what a killed run leaves is no obstacle."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from commands.output_folder import check_output_dir
from commands.run_lock import LOCK_FILE, locked


def write_lock(folder, **changes):
    me = {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}
    (folder / LOCK_FILE).write_text(json.dumps({**me, **changes}))


def enter(folder):
    with locked(folder):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_lock__keeps_others_out_until_it_is_released(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on"),
        locked(tmp_path),
    ):
        pass
    enter(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lock__is_released_by_an_error_and_leaves_no_new_folder(tmp_path):
    with pytest.raises(OSError, match="full"), locked(tmp_path / "out"):
        raise OSError("full")
    assert not (tmp_path / "out").exists()


def test_lock__of_a_process_that_has_ended_is_stale(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_lock(tmp_path, pid=ended.pid)
    enter(tmp_path)
    write_lock(tmp_path, started=1000.0)  # the number of this process, which began later
    enter(tmp_path)


def test_lock__that_may_be_held_elsewhere_names_the_file_to_delete(tmp_path):
    write_lock(tmp_path, host="another", pid=2**22 + 1)
    with pytest.raises(ValueError, match=rf"if it has died, delete {tmp_path}/{LOCK_FILE}$"):
        enter(tmp_path)
    (tmp_path / LOCK_FILE).write_text("")
    with pytest.raises(ValueError, match="cannot be read: delete it unless"):
        enter(tmp_path)


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
