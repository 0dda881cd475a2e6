"""Threads that work beside the main one, and are over before the interpreter is.

Before CPython 3.14 a daemon thread that comes back from C++ (torch, its store, tokenizers) while
the interpreter goes aborts the process: a run that went well would end with code 134.
"""

import atexit
import threading
from collections.abc import Callable

PATIENCE = 10.0  # seconds that the end of the process waits for a thread


def start(
    work: Callable[[], None], stop: Callable[[], object], name: str, patience: float = PATIENCE
) -> threading.Thread:
    """Run `work` in a daemon thread. At the end of the process, however that comes about but by
    os._exit or a signal, `stop` is called, which ends `work` soon, and the thread is waited for.
    """

    def run() -> None:
        try:
            work()
        finally:
            atexit.unregister(end)

    def end() -> None:
        stop()
        thread.join(patience)

    thread = threading.Thread(target=run, name=name, daemon=True)
    atexit.register(end)
    thread.start()
    return thread
