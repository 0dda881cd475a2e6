"""One process a run folder, on every kind of file system, whatever becomes of the owner."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.checkpoint import publish
from pipeline.errors import TrainingStopped, UserError
from pipeline.run import folder as run_folder
from pipeline.run import lock
from pipeline.run.lock import FolderLock
from pipeline.run.recipe_file import load_recipe
from tests.test_surroundings import recipe_file

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import errno, os, sys, time
from pathlib import Path
from pipeline.run import lock
lock.INTERVAL = 0.05
def fails(*args, **kwargs):
    raise OSError(errno.ENOLCK, "no locks")
if sys.argv[2] == "no locks":
    lock.FileLock.acquire = fails
held = lock.FolderLock(Path(sys.argv[1]))
held.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts another process that holds the folder; returns it once it does."""
    started = []

    def start(locks: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), locks], cwd=ROOT, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        while (line := process.stdout.readline()) and line != "held\n":
            pass
        assert line
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "INTERVAL", 0.05)
    monkeypatch.setattr(lock, "LEASE", 1.0)


def without_locks(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.FileLock, "acquire", fail)


def elsewhere(monkeypatch):
    monkeypatch.setattr(lock, "_machine", lambda: "another machine")


def left(folder):
    """A lock whose owner, on another machine, is gone; its file may be locked still."""
    lost = FolderLock(folder)
    lost.acquire()
    lost._released.set()
    lost._renewing.join(5)
    return lost


def test_where_flock_is_not_there_at_all_a_killed_owner_leaves_nothing(
    tmp_path, monkeypatch, quick
):
    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    left(tmp_path)
    elsewhere(monkeypatch)
    mine = FolderLock(tmp_path)
    mine.acquire()
    mine.release()


def test_a_run_begins_again_while_a_report_looks_whether_it_is_there(tmp_path, monkeypatch, quick):
    left(tmp_path)._lock.release()
    elsewhere(monkeypatch)
    looking = threading.Thread(target=lock.is_held, args=[tmp_path])
    looking.start()
    time.sleep(0.3)
    mine = FolderLock(tmp_path)
    mine.acquire()
    looking.join()
    assert lock.is_held(tmp_path)
    mine.release()


def test_a_file_server_frees_the_lock_of_a_machine_that_is_gone_late(tmp_path, monkeypatch, quick):
    gone = threading.Event()

    def be_gone():  # a file lock is a thread's
        lost = left(tmp_path)
        gone.set()
        time.sleep(3)
        lost._lock.release()

    threading.Thread(target=be_gone).start()
    gone.wait()
    elsewhere(monkeypatch)
    mine = FolderLock(tmp_path)
    mine.acquire()
    mine.release()


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_a_live_owner_is_named_and_a_killed_one_is_followed(
    tmp_path, monkeypatch, quick, hold, locks
):
    owner = hold(locks)
    if locks == "no locks":
        without_locks(monkeypatch)
    with pytest.raises(UserError, match=rf"in use by another process: process {owner.pid} on \S+"):
        FolderLock(tmp_path).acquire()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    mine = FolderLock(tmp_path)
    mine.acquire()
    mine.release()
    assert not (tmp_path / ".owner.json").exists()


def test_another_machine_is_waited_for_by_its_signs_and_not_by_clocks(
    tmp_path, monkeypatch, quick, hold
):
    owner = hold("no locks")
    without_locks(monkeypatch)
    elsewhere(monkeypatch)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that went back by decades
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path).acquire()
    owner.send_signal(signal.SIGSTOP)  # it stands still for longer than its lease
    time.sleep(0.2)
    mine = FolderLock(tmp_path)
    mine.acquire()
    mine.check()
    mine.release()


def test_an_owner_that_was_taken_over_stops(tmp_path, quick):
    mine = FolderLock(tmp_path)
    mine.acquire()
    owner = tmp_path / ".owner.json"
    owner.write_text(json.dumps({**json.loads(owner.read_text()), "token": "another"}))
    mine._renewing.join(timeout=10)  # it ends where it finds another's token
    with pytest.raises(TrainingStopped, match="taken"):
        mine.check()
    mine.release()
    assert owner.exists()  # it is the other's


def test_what_is_not_a_runs_is_neither_written_nor_deleted(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path), ["name=mine"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("my own")
    for begin in (lambda: run_folder.open_run(mine, recipe, {}).__enter__(),
                  lambda: run_folder.restart(tmp_path, recipe)):  # fmt: skip
        with pytest.raises(UserError, match=r"not a run folder, it holds recipe\.yaml"):
            begin()
    assert (mine / "recipe.yaml").read_text() == "my own"
    (mine / "recipe.yaml").unlink()
    with run_folder.open_run(mine, recipe, {}):
        pass
    (mine / "heldout").mkdir()  # of an attempt that failed early
    with run_folder.open_run(mine, recipe, {}):
        assert not (mine / "heldout").exists()
    run_folder.restart(tmp_path, recipe)
    assert not mine.exists()


def test_how_a_run_was_trained_stays_as_it_is(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path), ["name=done"])
    folder = tmp_path / "done"
    with run_folder.open_run(folder, recipe, {"first": 1}):
        pass
    for i, stage in enumerate(recipe.stages, start=1):
        published = run_folder.stage_folder(folder, i, stage.name) / "checkpoint"
        publish(published, lambda temporary: (temporary / "w").touch(), {})
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    other = load_recipe(recipe_file(tmp_path), ["name=done", "train.micro_batch_size=1"])
    with run_folder.open_run(folder, other, {"second": 2}):
        pass
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert before == {name: content for name, content in after.items() if name in before}


def test_a_folder_that_cannot_be_written_is_said_before_anything_else(tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    write = Path.write_bytes

    def read_only(path, data):
        if path.parent.name == "stages":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(UserError, match=r"cannot write into .*stages.*choose another folder"):
        run_folder._require_writable(tmp_path)
