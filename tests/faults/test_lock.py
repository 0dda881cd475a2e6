"""One process a run folder, on every kind of file system, whatever becomes of the owner."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import TrainingStopped, UserError
from pipeline.run import folder as run_folder
from pipeline.run import lock
from pipeline.run.lock import FolderLock

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
