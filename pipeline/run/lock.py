"""One process a run folder: a lock of the file system, and a lease where that is not enough.

`.lock` is locked with flock, which the system frees when its process ends, however it ends. Beside
it `.owner.json` says whose it is, and a thread counts up a number in it. That number is what holds
on file systems without locks and on those whose locks end at the machine: who finds an owner on
another machine watches the number, and takes the folder over when it stands still for `LEASE`
seconds of its own monotonic clock, so that no clock has to be right.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import TrainingStopped, UserError, advice
from pipeline.progress import now, say

INTERVAL = 5.0  # seconds between two counts of the owner
LEASE = 20.0  # seconds without one, after which the owner is gone
FREED = 120.0  # seconds within which a file server frees what a machine that is gone had locked

# What file systems say that have no locks; filelock makes a NotImplementedError of ENOSYS.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class FolderLock:
    """Of a folder that exists. `acquire`, then `release`; `check` in between."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = _file_lock(folder)
        self._owner = folder / ".owner.json"
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._renewing: threading.Thread | None = None
        self._taken = False  # by another process

    def acquire(self) -> None:
        """Raises UserError where another process holds the folder (which, and where it runs), or
        where it cannot be written."""
        locks = self._flock()
        try:
            known = self._read()
            if known and not (locks and _runs_here(known)) and self._lives(known):
                raise _in_use(self.folder, known)
            self._claim(known)
        except OSError as error:
            self._lock.release()
            raise _cannot_lock(self.folder, error) from None
        except UserError:
            self._lock.release()
            raise
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Raises TrainingStopped where another process took the folder over: this one stood still
        for longer than the lease."""
        if self._taken:
            raise TrainingStopped(
                f"another process has taken {self.folder} over, since this one stood still"
            )

    def release(self) -> None:
        """Give the folder back. It may be gone by now."""
        self._released.set()
        if self._renewing is not None:
            self._renewing.join()
            known = self._read()
            if known and known["token"] == self._token:
                self._owner.unlink(missing_ok=True)
        self._lock.release()

    def _flock(self) -> bool:
        """Whether the file system has locks; then this process has it now."""
        try:
            self._lock.acquire(timeout=0.2)  # `is_held` has it for an instant
        except Timeout:
            known = self._read()
            if known is None or _runs_here(known) or self._lives(known):
                raise _in_use(self.folder, known) from None
            try:
                self._lock.acquire(timeout=FREED)
            except Timeout:
                raise _in_use(self.folder, known) from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise _cannot_lock(self.folder, error) from None
            say(f"{self.folder}: this file system has no locks ({error}); the folder is held by a "
                "lease instead")  # fmt: skip
            return False
        return True

    def _lives(self, known: dict[str, Any]) -> bool:
        if _runs_here(known):
            return _process_started(known["pid"]) == known["process_started"]
        say(f"{self.folder} was held by process {known['pid']} on {known['host']}; waiting "
            f"{LEASE:.0f} seconds for a sign of it")  # fmt: skip
        deadline = time.monotonic() + LEASE
        while time.monotonic() < deadline:
            time.sleep(min(0.5, LEASE / 10))
            seen = self._read()
            if seen is None and not self._owner.exists():  # it has ended
                return False
            if seen and seen != known:
                return True
        return False

    def _claim(self, known: dict[str, Any] | None) -> None:
        """Become the owner; of two processes that try it at the same time, one does."""
        mine = json.dumps(self._describe(0)).encode()
        if known is None:
            self._owner.unlink(missing_ok=True)  # what cannot be read is nobody's
            try:
                descriptor = os.open(self._owner, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                raise _in_use(self.folder, self._read()) from None
            with os.fdopen(descriptor, "wb") as file:
                file.write(mine)
            return
        temporary = self._owner.with_name(f".owner.{self._token}")
        temporary.write_bytes(mine)
        os.replace(temporary, self._owner)
        time.sleep(0.05)
        found = self._read()
        if found is None or found["token"] != self._token:
            raise _in_use(self.folder, found)

    def _describe(self, beats: int) -> dict[str, Any]:
        """Always of the same length, so that a full disk takes it."""
        return {
            "host": socket.gethostname(), "pid": os.getpid(), "since": now(),
            "process_started": _process_started(os.getpid()), "machine": _machine(),
            "token": self._token, "beats": f"{beats:012d}",
        }  # fmt: skip

    def _renew(self) -> None:
        beats, described = 0, self._describe(0)
        while not self._released.wait(INTERVAL):
            known = self._read()
            if known and known["token"] != self._token:
                self._taken = True
                return
            beats += 1
            try:
                with self._owner.open("r+b") as file:
                    file.write(json.dumps({**described, "beats": f"{beats:012d}"}).encode())
            except OSError:  # the file system may come back
                continue

    def _read(self) -> dict[str, Any] | None:
        try:
            known = json.loads(self._owner.read_text(encoding="utf-8"))
            needed = {"host", "pid", "process_started", "machine", "token"}
            return known if needed <= {*known} else None
        except (OSError, ValueError, TypeError):
            return None


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder. It may take `LEASE` seconds where another machine did."""
    if not (folder / ".lock").exists():
        return False
    lock, file = FolderLock(folder), _file_lock(folder)
    try:
        file.acquire(timeout=0)
        locks = True
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # no locks there: what is left is the lease
        locks = False
    known = lock._read()
    file.release()  # who starts the run again may
    if known is None:
        return False
    return not (locks and _runs_here(known)) and lock._lives(known)


def _file_lock(folder: Path) -> FileLock:
    """Without a file in its place where the file system has no locks: a killed owner leaves it."""
    return FileLock(folder / ".lock", fallback_to_soft=False)


def _in_use(folder: Path, known: dict[str, Any] | None) -> UserError:
    who = ""
    if known:
        who = f": process {known['pid']} on {known['host']}, since {known.get('since')}"
    return UserError(
        f"{folder} is in use by another process{who}. Wait for it, or give this run a name of its "
        "own (name=...)."
    )


def _cannot_lock(folder: Path, error: OSError) -> UserError:
    help_ = advice(error) or "Choose another folder with --runs"
    return UserError(f"cannot lock {folder}: {error}. {help_}.")


def _machine() -> str:
    """What process numbers belong to: a boot of a machine, and in it a container."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # no Linux
        pass
    return " ".join(parts)


def _runs_here(known: dict[str, Any]) -> bool:
    return known["machine"] == _machine()


def _process_started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the machine did (no clock that can be
    set); None if it is gone. Its number may have been given to another one since."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = status.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)  # no Linux: sends nothing
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""
