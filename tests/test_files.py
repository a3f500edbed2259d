"""Files that are either old or new, whoever is killed meanwhile, and the locks beside them."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmsleep.files import check_place, locked, replacing, write_atomic

WRITER = """
import os, signal, sys
from pathlib import Path
from lmsleep.files import replacing

with replacing(Path("file")) as file:
    file.write(b"theirs")
    file.flush()
    print("writing", flush=True)
    if sys.stdin.read() == "die":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def writer(tmp_path):
    # Another process in the middle of writing `file`; told to die or to go on.
    running = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert running.stdout.readline() == b"writing\n"
    yield lambda word: running.communicate(word) and running.returncode
    running.kill()
    running.wait()


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path, writer):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert writer(b"die") == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 and path.read_bytes() == b"old"
    others = [".file.1.note", ".file.notes", ".file2.123.abcd", ".other.123.abcd", ".file.lock"]
    for name in others:
        (tmp_path / name).touch()
    for name in (".file.4194999.0123abcd", f".file.{os.getpid()}.abcd"):  # numbers of processes come again
        (tmp_path / name).touch()
    write_atomic(path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "file"])


def test_a_write_that_goes_on_is_not_swept(tmp_path, writer):
    write_atomic(tmp_path / "file", b"ours")
    assert len(list(tmp_path.iterdir())) == 2
    assert writer(b"go on") == 0 and (tmp_path / "file").read_bytes() == b"theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("before", [None, 0o600, 0o640, 0o444, 0o4711, "link"])
def test_a_file_hands_its_mode_on_and_is_never_readable_by_more(tmp_path, before):
    path, target = tmp_path / "file", tmp_path / "target"
    if before == "link":
        target.write_bytes(b"precious")
        target.chmod(0o666)
        path.symlink_to(target)
    elif before is not None:
        path.write_bytes(b"old")
        path.chmod(before)
    wanted = before & 0o777 if isinstance(before, int) else 0o600
    with replacing(path, mode=0o600) as file:
        [temporary] = [p for p in tmp_path.iterdir() if p.name.startswith(".file.")]
        assert mode(temporary) & ~wanted & 0o077 == 0
        file.write(b"new")
    assert mode(path) == wanted and path.read_bytes() == b"new"
    assert before != "link" or (target.read_bytes() == b"precious" and not path.is_symlink())


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "b" * 249])
def test_names_may_be_as_long_as_names_are(tmp_path, name):
    path = tmp_path / name
    with locked(path):
        write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    for refuse in (check_place, lambda path: locked(path).__enter__()):
        with pytest.raises(OSError, match="too long"):
            refuse(tmp_path / ("a" * 256))


@pytest.mark.parametrize("place", ["missing/file", "folder", "full"])
def test_what_cannot_be_written_is_named(tmp_path, place):
    path = tmp_path / place
    (tmp_path / "folder").mkdir()
    if place == "full":
        path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if place == "full":  # SIGXFSZ is ignored by Python
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError) as caught:
            write_atomic(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(path)
    assert place != "full" or path.read_bytes() == b"old"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_lock_is_gone_when_it_is_let_go(tmp_path):
    path = tmp_path / "file"
    for error in (None, ValueError):
        try:
            with locked(path):
                assert (tmp_path / ".file.lock").exists()
                with pytest.raises(ValueError, match="is being written by another process"), locked(path):
                    pass
                if error:
                    raise error
        except ValueError:
            pass
        assert not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_though_it_comes_and_goes(tmp_path):
    path, inside, most, seen = tmp_path / "file", threading.Semaphore(1), 40, []

    def take(i):
        while True:
            try:
                with locked(path):
                    assert inside.acquire(blocking=False)
                    seen.append(i)
                    inside.release()
                    return
            except ValueError:
                continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(most)))
    assert sorted(seen) == list(range(most)) and not list(tmp_path.iterdir())
