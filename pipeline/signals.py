"""A scheduler or a person asks the run to end: heard at once, obeyed where nothing is lost.

SIGTERM, SIGINT and SIGUSR1 are heard by a thread, so that a rank hears them in a collective too.
The heartbeat tells the other ranks. The loop acts between two steps, an evaluation
between two looks at its process (`check`). Who has not ended after the grace period, or is asked a
second time, ends at once: what is on disk is whole at any moment.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from pipeline.errors import RETRY, Interrupted
from pipeline.progress import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds within which further signals are the same wish: a terminal signals every process of the
# run, and then its launcher signals the ranks once more.
SAME_WISH = 2.0


class _Wish:
    careful = False
    reason: str | None = None
    since = 0.0
    grace: float | None = None


_wish = _Wish()


def asked() -> str | None:
    """Why this rank is to end; None while it is not."""
    return _wish.reason


def ask(reason: str) -> None:
    """Let this rank end at its next safe point."""
    if _wish.reason is None:
        _wish.since, _wish.reason = time.monotonic(), reason
        if _wish.grace is not None:
            timer = threading.Timer(_wish.grace, _end, [f"{reason}, and the grace period is over"])
            timer.daemon = True
            timer.start()


def check() -> None:
    """Raises Interrupted if this rank is to end. For places that the other ranks do not wait at."""
    if _wish.reason is not None:
        raise Interrupted(_wish.reason)


def acquire(lock: FileLock, why: str) -> None:
    """Wait for a lock, and say why. Raises Interrupted if this rank is to end meanwhile."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(why)
        while not lock.is_locked:
            check()
            with suppress(Timeout):
                lock.acquire(timeout=1, poll_interval=0.2)


def be_careful() -> None:
    """From here on there is something to lose: a signal waits for a safe point. Before, it raises
    Interrupted wherever the main thread is."""
    _wish.careful = True


@contextmanager
def listening(grace: float) -> Iterator[None]:
    """Hear the SIGNALS meanwhile. Only the main thread can; elsewhere this does nothing.

    grace: seconds between the first signal and the end of the process, whatever it does then.
    """
    _wish.reason, _wish.grace, _wish.careful = None, None, False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receives, sends = socket.socketpair()
    sends.setblocking(False)
    # The interpreter writes a signal's number there at once; its handlers wait for the main thread.
    before = signal.set_wakeup_fd(sends.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _handle) for number in SIGNALS}
    threading.Thread(target=_hear, args=(receives,), name="signals", daemon=True).start()
    _wish.grace = grace
    try:
        yield
    finally:
        _wish.grace = None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        sends.close()  # ends the thread


def _handle(number: int, _frame: object) -> None:
    """In the main thread, when it next runs."""
    if not _wish.careful:
        raise Interrupted(signal.Signals(number).name)


def _hear(receives: socket.socket) -> None:
    with receives:
        while number := receives.recv(1):
            if number[0] not in SIGNALS:
                continue
            name = signal.Signals(number[0]).name
            if _wish.reason is None:
                print(
                    f"{name}: ending at the next safe point; once more ends at once",
                    file=sys.stderr,
                    flush=True,
                )
                ask(name)
            elif time.monotonic() - _wish.since > SAME_WISH:
                _end(f"{name}: asked a second time")


def _end(reason: str) -> None:
    if _wish.grace is None:
        return  # what was to end has ended
    print(f"{reason}: ended at once; run the same command again to continue", file=sys.stderr,
          flush=True)  # fmt: skip
    os._exit(RETRY)
