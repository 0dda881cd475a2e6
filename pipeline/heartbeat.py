"""Ranks that wait for another rank learn at once that it is gone, and which one it is.

A thread of every rank counts up a key in the process group's store. Rank 0's thread watches all the
counters and says there whose has stopped; the others' watch rank 0's, and what it says. So whoever
works for hours may, and whoever is gone is missed within `LIMIT` seconds. A rank that is in a
collective then, which nothing else ends, is ended by its thread. The same way the ranks learn that
one of them was asked to end (`pipeline.signals`).
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from pipeline import background, signals
from pipeline.errors import RETRY, RankLost
from pipeline.redact import redact

INTERVAL = 1.0  # seconds between two beats
PATIENCE = 30.0  # seconds to leave a collective, or whatever else, after a rank is gone
LIMIT = 120.0  # seconds without one, after which a rank is gone


class Heartbeat:
    """Of this rank, until the process ends."""

    def __init__(self, store: Any, rank: int, ranks: int):
        """
        Args:
            store: of the process group. Its operations may come from several threads, but a `get`
                of a key that is not there would block them all: look first.
        """
        self._store, self._rank = store, rank
        self._watched = list(range(1, ranks)) if rank == 0 else [0]
        self._seen: dict[int, tuple[bytes, float]] = {}
        self.gone: str | None = None  # who, and what is known about it
        self._code = RETRY  # its exit code, which is this rank's then
        self._stays = False  # this rank ends by itself
        self._over = threading.Event()  # this process
        background.start(self._beat, self._over.set, "heartbeat")

    def wait(self, until: Callable[[], bool]) -> None:
        """Until something is so; raises RankLost as soon as a rank is gone."""
        pause = 0.001
        while True:
            try:
                if until():
                    return
            except RuntimeError as error:  # the store's
                self.check()
                raise RankLost(f"rank 0 is gone ({_first_line(error)})") from None
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.25)

    def check(self) -> None:
        """Raises RankLost if a rank is gone."""
        if self.gone is not None:
            raise RankLost(self.gone, self._code)

    def say(self, key: str) -> None:
        self._store.set(f"heartbeat/{key}", "1")

    def said(self, key: str) -> bool:
        return self._store.check([f"heartbeat/{key}"])

    def count(self, key: str, more: int) -> int:
        """Add to a counter that all ranks share; its new value."""
        return self._store.add(f"heartbeat/{key}", more)

    def lost(self) -> RankLost:
        """Why a collective has broken: another rank has said that it ends, or is just gone."""
        try:
            if self.gone is None and self.said("gone"):
                self._hear_of_the_gone()
        except RuntimeError:
            pass  # the store is gone too
        return RankLost(self.gone or "another rank is gone; see what it has said", self._code)

    def leave(self, reason: str, code: int, alone: bool) -> None:
        """This rank ends; the others need not wait for it, and end with the same code.

        alone: they do not know it by themselves, so the store, which may be rank 0's, has to stay
            until they have heard.
        """
        self._stays = True
        if self.gone is None:
            try:
                self._store.set(
                    "heartbeat/gone", f"{code} rank {self._rank} ended: {redact(reason)}"
                )
                if alone and self._rank == 0:
                    time.sleep(2 * INTERVAL)
            except RuntimeError:
                return  # so has the store

    def _beat(self) -> None:
        beats = 0
        told = False  # the others, that this rank is to end
        while self.gone is None and not self._over.is_set():
            beats += 1
            try:
                if signals.asked() and not told:
                    self._store.set("heartbeat/asked", signals.asked())
                    told = True
                elif not told and self.said("asked"):
                    signals.ask(self._store.get("heartbeat/asked").decode())
                    told = True
                self._store.set(f"heartbeat/{self._rank}", str(beats))
                if self.said("gone"):
                    self._hear_of_the_gone()
                elif silent := self._silent():
                    self.gone = f"rank {silent[0]} has not been heard of for {LIMIT:.0f} seconds"
                    self._store.set("heartbeat/gone", f"{RETRY} {self.gone}")
            except RuntimeError as error:  # the store is rank 0's, or the launcher's
                self.gone = f"rank 0 is gone ({_first_line(error)})"
            self._over.wait(INTERVAL)
        if self._stays or self._over.wait(PATIENCE):  # usually the process ends meanwhile
            return
        print(f"rank {self._rank}: stopped: {self.gone}", file=sys.stderr, flush=True)
        os._exit(self._code)

    def _hear_of_the_gone(self) -> None:
        code, who = self._store.get("heartbeat/gone").decode().split(" ", 1)
        self._code, self.gone = int(code), who

    def _silent(self) -> list[int]:
        keys = [f"heartbeat/{r}" for r in self._watched]
        if not self._store.check(keys):
            return []  # not all of them have begun
        now = time.monotonic()
        for r, beats in zip(self._watched, self._store.multi_get(keys), strict=True):
            if r not in self._seen or self._seen[r][0] != beats:
                self._seen[r] = beats, now
        return [r for r in self._watched if now - self._seen[r][1] > LIMIT]


_mine: Heartbeat | None = None


def start() -> None:
    """Of a process group of several ranks, once it is there."""
    global _mine
    if _mine is None and dist.get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        _mine = Heartbeat(store, dist.get_rank(), dist.get_world_size())


def mine() -> Heartbeat | None:
    """None with one rank, and in a process group that somebody else has made."""
    return _mine


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
