"""Only new and changed files are opened again, and nothing that is stale or damaged is believed."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forked import Forked, run_forked
from PIL import Image

from data import image_checks, scan_file
from data.image_checks import CheckedImages, check_images
from data.image_source import FileSource
from data.scan_file import scan_file_of
from data.sources import open_source

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))[:12]
TRUNCATED = PHOTOGRAPHS[0].read_bytes()[:4000]
Opened = Callable[..., tuple[CheckedImages, list[str]]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", tmp_path_factory.mktemp("assets"))
    cached = scan_file.cached_assets_path
    folder = tmp_path_factory.mktemp("assets")
    monkeypatch.setattr(scan_file, "cached_assets_path", lambda *names: cached(*names, assets_dir=folder))
    monkeypatch.setattr(scan_file, "NANOSECONDS_UNTIL_SETTLED", 0)  # the tests change files quickly


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for number, photograph in enumerate(PHOTOGRAPHS):
        (photos / ("more" if number % 3 else "") / photograph.name).write_bytes(photograph.read_bytes())
    (photos / "zzz_truncated.jpg").write_bytes(TRUNCATED)
    settle()
    return photos


def settle() -> None:
    """Let the coarse clock of the file system advance."""
    time.sleep(0.02)


@pytest.fixture
def check_and_list(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Check a data set; returns the result and the names of the files that were opened."""
    opened: list[str] = []
    open_file = os.open

    def spy(path: bytes, *arguments: int) -> int:
        if os.fsdecode(path).endswith((".jpg", ".png")):
            opened.append(Path(os.fsdecode(path)).name)
        return open_file(path, *arguments)

    def check_source(dataset: Path, checks: str = "new") -> tuple[CheckedImages, list[str]]:
        opened.clear()
        checked = check_images(open_source(str(dataset)), 0.5, 1, checks)
        return checked, sorted(set(opened))

    monkeypatch.setattr(os, "open", spy)
    return check_source


def same(first: CheckedImages, second: CheckedImages) -> bool:
    sizes = [(c.good.tolist(), c.bad, c.summary.modes, c.summary.width, c.summary.height) for c in (first, second)]
    return sizes[0] == sizes[1]


def test_second_scan__opens_nothing_and_knows_the_same(folder: Path, check_and_list: Opened) -> None:
    first, opened = check_and_list(folder)
    assert len(opened) == 13
    second, opened = check_and_list(folder)
    assert opened == []
    assert same(first, second)
    assert list(second.bad) == [str(folder / "zzz_truncated.jpg")]
    assert "truncated" in second.bad[str(folder / "zzz_truncated.jpg")]
    assert "; 0 of them new or changed since an earlier run" in second.summary.describe()
    assert check_and_list(folder, "all")[1] == sorted(path.name for path in folder.rglob("*.jpg"))


def test_scan_file__does_not_depend_on_how_the_folder_is_spelled(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_and_list(folder)
    monkeypatch.chdir(folder.parent)
    assert check_and_list(Path("photos"))[1] == []
    checked, opened = check_and_list(Path("photos/more/.."))
    assert opened == []
    assert len(checked.good) == 12


def test_list_of_paths__is_kept_too(folder: Path, check_and_list: Opened) -> None:
    names = [*(f"photos/more/{path.name}" for path in PHOTOGRAPHS[1:3]), str(folder / PHOTOGRAPHS[0].name)]
    listing = folder.parent / "list.txt"
    listing.write_text("\n".join(names))
    assert len(check_and_list(listing)[1]) == 3
    listing.write_text("\n".join([*names[1:], f"photos/{PHOTOGRAPHS[3].name}"]))
    checked, opened = check_and_list(listing)
    assert opened == [PHOTOGRAPHS[3].name]
    assert len(checked.good) == 3


def test_several_folders__are_kept_each(folder: Path, check_and_list: Opened) -> None:
    source = open_source([str(folder), str(folder / "more")])
    first = check_images(source, 0.5)
    assert check_and_list(folder)[1] == []
    assert check_and_list(folder / "more")[1] == []
    second = check_images(source, 0.5)
    assert second.summary.num_opened == 0
    assert same(first, second)


# ---- changes of the files ----


def test_added_and_removed_files__are_noticed(folder: Path, check_and_list: Opened) -> None:
    check_and_list(folder)
    (folder / PHOTOGRAPHS[0].name).unlink()
    (folder / "added.png").write_bytes(TRUNCATED)
    Image.open(PHOTOGRAPHS[5]).resize((20, 30)).save(folder / "added2.png")
    settle()
    checked, opened = check_and_list(folder)
    assert opened == ["added.png", "added2.png"]
    assert (len(checked.good), len(checked.bad)) == (12, 2)
    assert checked.summary.formats == {"JPEG": 11, "PNG": 1}
    assert check_and_list(folder)[1] == []


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def overwrite_and_restore_mtime(path: Path, content: bytes) -> None:
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def move_over(path: Path, content: bytes) -> None:
    status = path.stat()
    other = path.with_suffix(".new")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [overwrite, overwrite_and_restore_mtime, move_over])
def test_file_of_equal_size__is_opened_again(folder: Path, check_and_list: Opened, change: Callable) -> None:
    path = folder / PHOTOGRAPHS[0].name
    first, _ = check_and_list(folder)
    damaged = path.read_bytes()[:-200] + bytes(range(200))
    change(path, damaged)
    assert path.stat().st_size == len(damaged)
    settle()
    second, opened = check_and_list(folder)
    assert opened == [path.name]
    assert second.bad.keys() - first.bad.keys() == {str(path)}
    change(path, PHOTOGRAPHS[0].read_bytes())
    settle()
    assert same(check_and_list(folder)[0], first)  # the old reason is gone


def test_file_that_changed_just_now__is_not_kept(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the clock, a second change leaves size and times as they are."""
    monkeypatch.setattr(scan_file, "NANOSECONDS_UNTIL_SETTLED", 3600 * 10**9)
    check_and_list(folder)
    assert len(check_and_list(folder)[1]) == 13


def test_file_that_changes_during_the_scan__is_opened_again(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, scan_files = folder / PHOTOGRAPHS[0].name, image_checks.scan_files

    def scan_and_change(*arguments: object) -> object:
        found = scan_files(*arguments)
        move_over(path, TRUNCATED)
        return found

    monkeypatch.setattr(image_checks, "scan_files", scan_and_change)
    source = open_source(str(folder))
    monkeypatch.setattr(image_checks, "_IMAGES_PER_TASK", 100)
    records = check_images(source, 0.5, 1)
    assert str(path) not in records.bad
    monkeypatch.setattr(image_checks, "scan_files", scan_files)
    checked, opened = check_and_list(folder)
    assert path.name in opened
    assert str(path) in checked.bad


def test_failing_storage__is_asked_again(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = folder / PHOTOGRAPHS[0].name, os.pread
    inode = path.stat().st_ino

    def fail(descriptor: int, *arguments: int) -> bytes:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", fail)
        checked, _ = check_and_list(folder)
    assert checked.bad[str(path)] == "cannot be read: Input/output error"
    checked, opened = check_and_list(folder)
    assert opened == [path.name]
    assert str(path) not in checked.bad


def test_file_without_permission__is_asked_again(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / PHOTOGRAPHS[0].name
    open_file = os.open

    def refuse(name: bytes, *arguments: int) -> int:
        if os.fsdecode(name) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(name, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert check_images(open_source(str(folder)), 0.5, 1).bad[str(path)] == "cannot be opened: Permission denied"
    checked, opened = check_and_list(folder)
    assert opened == [path.name]
    assert str(path) not in checked.bad


# ---- the scan file itself ----


def only_scan_file(folder: Path) -> Path:
    source = open_source(str(folder))
    assert isinstance(source, FileSource)
    return scan_file_of(source)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda file: file.write_bytes(b""), lambda file: file.unlink()])
def test_damaged_scan_file__is_ignored_and_replaced(folder: Path, check_and_list: Opened, damage: Callable) -> None:
    first, _ = check_and_list(folder)
    damage(only_scan_file(folder))
    second, opened = check_and_list(folder)
    assert len(opened) == 13
    assert same(first, second)
    assert check_and_list(folder)[1] == []


def test_scan_file__of_other_code_or_another_pillow_is_ignored(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_and_list(folder)
    monkeypatch.setattr("PIL.__version__", "99.0")
    assert len(check_and_list(folder)[1]) == 13
    assert check_and_list(folder)[1] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_full_disk__is_a_note_and_the_old_scan_file_stays(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    check_and_list(folder)
    file = only_scan_file(folder)
    before = file.read_bytes()
    (folder / "new.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes())
    settle()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        checked, opened = check_and_list(folder)
    assert opened == ["new.jpg"]
    assert f"cannot be kept in {file.parent} ({os.strerror(number)})" in checked.summary.notes[0]
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == before
    assert check_and_list(folder)[1] == ["new.jpg"]


# The variable is read at the import, which a forked process has behind it.
KEEP_IN = "import os, huggingface_hub.constants as hub; hub.HF_ASSETS_CACHE = os.environ['HF_ASSETS_CACHE']\n"


def keep_in(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_ASSETS_CACHE": str(folder.parent / "assets")}


def test_really_full_disk__is_a_note(folder: Path) -> None:
    """In a process that may write files of 1 kB only."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from data import scan_file; scan_file.NANOSECONDS_UNTIL_SETTLED = 0\n"
        "from data.image_checks import check_images; from data.sources import open_source\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "print(check_images(open_source(sys.argv[1]), 0.5, 1).summary.notes)"
    )
    ran = run_forked(["-c", KEEP_IN + program, folder], keep_in(folder), ROOT)
    assert "File too large" in ran.stdout, ran.stderr
    assert not [path for path in (folder.parent / "assets").rglob("*") if path.is_file()]


def test_cache_that_cannot_be_made__is_a_note(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_file, "cached_assets_path", lambda *_: Path("/proc/no/such/folder"))
    checked = check_images(open_source(str(folder)), 0.5, 1)
    assert len(checked.good) == 12
    assert "the next run will check all of them again" in checked.summary.notes[0]


CHECK = """
import os, sys, time
from data import scan_file
from data.image_checks import check_images
from data.sources import open_source
scan_file.NANOSECONDS_UNTIL_SETTLED = 0
if sys.argv[2] == "slowly":  # half of a scan file is on the disk while this process sleeps
    def write_half(file, table, replace=scan_file._replace):
        def stop(descriptor, mode):
            stream = open(descriptor, mode)
            write = stream.write
            class Slow:
                def __enter__(self): return self
                def __exit__(self, *_): stream.close()
                def write(self, content):
                    write(bytes(content)[: len(content) // 2 + 1]); stream.flush()
                    print("writing", flush=True); time.sleep(60)
            return Slow()
        os.fdopen = stop
        replace(file, table)
    scan_file._replace = write_half
checked = check_images(open_source(sys.argv[1]), 0.5, 1)
print(len(checked.good), checked.summary.num_opened, checked.summary.notes)
"""


def test_kill_while_writing__leaves_nothing_that_is_believed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", CHECK, str(folder), "slowly"]
    with subprocess.Popen(command, cwd=ROOT, env=keep_in(folder), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    files = [path for path in (folder.parent / "assets").rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".unfinished"]
    os.utime(files[0], (0, 0))
    words = ["-c", KEEP_IN + CHECK, folder, "normally"]
    outputs = [run_forked(words, keep_in(folder), ROOT).stdout.split(" ", 2)[:2] for _ in range(2)]
    assert outputs == [["12", "12"], ["12", "0"]]
    files = [path for path in (folder.parent / "assets").rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".scan"]  # the remains of the killed process are gone


def test_processes_at_once__share_a_scan_file_that_is_always_whole(folder: Path) -> None:
    """Four threads check and rewrite; whoever reads meanwhile finds a whole file or none."""
    source = open_source(str(folder))
    assert isinstance(source, FileSource)
    expected = check_images(source, 0.5, 1)
    records, reasons = scan_file.load_scan(source)
    failures: list[object] = []
    stop = time.monotonic() + 2

    def write() -> None:
        while time.monotonic() < stop:
            if note := scan_file.save_scan(source, records, reasons, time.time_ns()):
                failures.append(note)

    def read() -> None:
        while time.monotonic() < stop:
            found, texts = scan_file.load_scan(source)
            if not (found == records).all() or texts != reasons:
                failures.append(found)

    threads = [threading.Thread(target=work) for work in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    words = ["-c", KEEP_IN + CHECK, folder, "normally"]
    processes = [Forked(words, keep_in(folder), ROOT) for _ in range(2)]
    assert [process.communicate()[0].split(" ")[0] for process in processes] == ["12", "12"]
    assert same(check_images(source, 0.5, 1), expected)


def test_read_only_data__can_be_kept(folder: Path, check_and_list: Opened) -> None:
    for path in (folder / "more", folder):
        path.chmod(0o555)
    try:
        settle()
        check_and_list(folder)
        assert check_and_list(folder)[1] == []
        assert not [path for path in folder.rglob("*") if path.suffix not in (".jpg", "")]
    finally:
        for path in (folder, folder / "more"):
            path.chmod(0o755)


# ---- a sample ----


def test_sample__opens_some_and_says_what_to_expect(
    folder: Path, check_and_list: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_checks, "NUM_SAMPLED", 10)
    for number in range(90):
        (folder / f"{number}.jpg").write_bytes(TRUNCATED if number % 3 == 0 else PHOTOGRAPHS[1].read_bytes())
    first, opened = check_and_list(folder, "sample")
    assert len(opened) == 10
    assert check_and_list(folder, "sample")[1] == opened  # seeded, and not kept
    num_bad = len(first.bad)
    assert 0 < num_bad < 10
    assert len(first.good) == 103 - num_bad
    assert first.summary.num_images == 103 - num_bad
    assert first.summary.num_checked == 10 - num_bad
    assert f"{num_bad} of it cannot be read, so about {num_bad * 103 / 10:,.0f} of all" in first.summary.notes[0]
    assert f"of which {10 - num_bad} were checked" in first.summary.describe()
    with pytest.raises(ValueError, match=f"{num_bad} of 10 checked images cannot be read"):
        check_images(open_source(str(folder)), 0.05, 1, "sample")
    assert len(check_and_list(folder)[1]) == 103


def test_indices__are_those_of_the_whole_data_set_in_every_kind_of_check(folder: Path) -> None:
    source = open_source([str(folder), "sample-fashion"])
    checked = check_images(source, 0.5, 1)
    bad = np.setdiff1d(np.arange(len(source)), checked.good).tolist()
    assert [source.name(index) for index in bad] == list(checked.bad) == [str(folder / "zzz_truncated.jpg")]
    again = check_images(open_source(["sample-fashion", str(folder)]), 0.5, 1)
    assert len(again.good) == len(checked.good)
    assert list(again.bad) == list(checked.bad)
