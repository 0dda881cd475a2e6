"""Loops that take turns step by step, so that a slow moment of the machine hits all alike."""

import ctypes
import os
import threading
import time

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # of malloc.h


class Turns:
    """Lets one loop at a time run one step, and takes its time."""

    def __init__(self, device: str):
        self._device = device
        self._go = threading.Event()
        self._back = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None
        self._start = 0.0
        self.seconds: list[float] = []

    def loop(self) -> None:
        """To be overridden: a loop that calls `begin` before and `end` behind each step."""
        raise NotImplementedError

    def begin(self) -> None:
        self._start = self._now()

    def end(self) -> None:
        """Waits for the next turn: what a loop does between its steps, collectives among it, is
        done within its turns too. Behind the last one there is none."""
        self.seconds.append(self._now() - self._start)
        self._back.set()
        self._wait()

    def _wait(self) -> None:
        self._go.wait()
        self._go.clear()

    def step(self) -> None:
        """Called by the one who gives the turns."""
        if not self._thread.is_alive() and not self.seconds:
            self._thread.start()
        self._go.set()
        self._back.wait()
        self._back.clear()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        try:
            self._wait()
            self.loop()
        except BaseException as error:
            self._error = error
            self._back.set()

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def keep_freed_memory(large: bool) -> None:
    """Let the C library keep what is freed for the next step, as torch's allocator of a GPU does: a
    large tensor would be fetched from the system anew each time, page by page.

    large: also blocks over 64 MB (flat buffers, the embeddings' gradient), which the arenas of
        threads give back; else they cost a CPU what they cost it in any run.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    trim = (M_TRIM_THRESHOLD, -1 if large else 2**31 - 1)
    one = [(M_ARENA_MAX, 1)] if large else []
    for setting in ((M_MMAP_MAX, 0), trim, (M_TOP_PAD, 2**28), *one):
        libc.mallopt(*setting)
