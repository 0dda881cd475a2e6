"""The folder of a stage's resume checkpoints: how one is written beside training, and found again.

The folder of one appears whole or not at all, and an older one is deleted only when a newer one is
on the disk. `pipeline/run/stage_state.py` has what is in it.
"""

import json
import os
import secrets
import shutil
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import background
from pipeline.checkpoint import damage, is_published, read_manifest, seal, sha256
from pipeline.errors import everywhere
from pipeline.nodes import exchange_files, first_beside
from pipeline.progress import say
from pipeline.ranks import gather, on_rank0, rank, world_size
from pipeline.recipe import Resume
from pipeline.run.random_state import random_state
from pipeline.run.shard_files import key_of, write_pieces
from pipeline.run.stage_state import STATE, StageState, State


class Saver:
    """Saves a stage while it trains: a copy, which a thread of every rank writes."""

    def __init__(self, folder: Path, settings: Resume, state: StageState, begun: int = 0):
        """All ranks make it, when the stage is as it begins.

        Args:
            folder: of the stage's checkpoints.
            begun: the step of the checkpoint that the stage goes on from, which is kept until there
                are newer ones.
        """
        self._folder, self._settings, self._state = folder, settings, state
        self._token = on_rank0(partial(secrets.token_hex, 4))  # of this attempt
        self._near = _near(folder)
        self._shared = len(self._near) == world_size()  # by all machines
        self._clear(".*.tmp")
        self._own = _share(state)
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._problem: str | None = None
        self.newest = begun  # the step that was saved last
        self._durable = [begun]  # steps whose checkpoints are whole, the newest last
        self._since = time.monotonic()

    @property
    def late(self) -> bool:
        """Whether it is time for the next one, by this rank's clock."""
        minutes = self._settings.minutes
        return minutes is not None and time.monotonic() - self._since > 60 * minutes

    @property
    def failed(self) -> bool:
        """Whether this rank knows that what was being written is not on the disk."""
        return self._problem is not None

    def due(self, step: int) -> bool:
        return self._settings.steps is not None and step % self._settings.steps == 0

    def save(self, step: int) -> None:
        """Copy what the ranks hold behind a step, and let it be written. All ranks call it."""
        self.finish()
        state = {"step": step, **self._state.of_all()}
        shapes: dict[str, tuple[int, ...]] = {}
        pieces: dict[str, torch.Tensor] = {}
        for kind, live in self._state.pieces():
            key = key_of(kind, live.name, live.start)
            if key in self._own:
                shapes[live.name] = live.shape
                pieces[key] = self._copy(key, live.tensor)
        steps = {s.master.name: s.step for s in self._state.engine.state_shards()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        side = {"shapes": shapes, "steps": steps, "random": random_state()}
        self._written.clear()
        self._given_up.clear()
        self._problem = None
        write = partial(self._write, step, state, pieces, side)
        self._thread = background.start(write, self._given_up.set, "resume checkpoint", 60)
        self.newest, self._since = step, time.monotonic()

    def finish(self) -> str | None:
        """Wait until what is being written is on the disk; why it is not, said by rank 0: the
        checkpoints before it are unharmed, and training may go on. All ranks call it.

        Raises:
            UserError: on every rank, why it is not, where the recipe stops then.
        """
        if self._thread is None:
            return None
        self._written.wait()
        if any(gather(self._problem)):
            self._given_up.set()
        self._thread.join()
        self._thread = None
        problem = next((p for p in gather(self._problem) if p), None)
        self._problem = None
        if problem:  # now that no rank writes there
            self._clear(self._temporary(self.newest))
        elif not self._shared and rank() == self._near[0]:
            self._delete_older(self.newest)
        text = f"{self._folder}: no resume checkpoint was written: {problem}"
        if problem and self._settings.on_error == "stop":
            raise everywhere(
                f"{text}. Those before it are whole: mend this and run the same command again, or "
                "set resume.on_error=go_on"
            )
        if problem and rank() == 0:
            say(text)
        return problem

    def _temporary(self, step: int) -> str:
        return f".{_name(step)}.{self._token}.tmp"

    def _clear(self, pattern: str) -> None:
        """Delete what was begun and not published."""
        if rank() == self._near[0]:
            for leftover in self._folder.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def _copy(self, key: str, live: torch.Tensor) -> torch.Tensor:
        if key not in self._buffers:
            pinned = torch.cuda.is_available()
            self._buffers[key] = torch.empty(live.numel(), pin_memory=pinned)
        return self._buffers[key].copy_(live.detach(), non_blocking=True)

    def _write(self, step: int, state: State, pieces: dict[str, Any], side: State) -> None:
        temporary = self._folder / self._temporary(step)
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            stem = f"rank-{rank():05d}"
            side["sha256"] = write_pieces(temporary / f"{stem}.safetensors", pieces)
            _write_json(temporary / f"{stem}.json", side)
            self._written.set()
            if rank() == self._near[0]:
                self._publish(temporary, step, state)
        except Exception as error:  # whatever it is, training does not depend on it
            self._problem = f"rank {rank()}: {error}"
        finally:
            self._written.set()

    def _publish(self, temporary: Path, step: int, state: State) -> None:
        """Of this machine's ranks, when all of them have written."""
        sides = [temporary / f"rank-{r:05d}.json" for r in self._near]
        while not all(side.exists() for side in sides):
            if self._given_up.wait(0.02):
                return
        _write_json(temporary / STATE, state)
        digests = {STATE: sha256(temporary / STATE)}
        for side in sides:
            digests[side.name] = sha256(side)
            written = json.loads(side.read_text(encoding="utf-8"))
            digests[side.with_suffix(".safetensors").name] = written["sha256"]
        seal(temporary, self._folder / _name(step), {"step": step, "token": self._token}, digests)
        if self._shared:  # else when the other machines have theirs too
            self._delete_older(step)

    def _delete_older(self, step: int) -> None:
        """What need not be kept, now that the checkpoint of this step is whole."""
        self._durable.append(step)
        kept = {_name(s) for s in self._durable[-self._settings.keep :]}
        every = self._settings.keep_every
        for folder in self._folder.glob("step-*"):
            if folder.name not in kept and (not every or int(folder.name[5:]) % every):
                _delete(folder)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage. All ranks call it, and find the same.

    A damaged one is named and passed over.
    """
    if not on_rank0(folder.exists):
        return None
    near = _near(folder)
    here: dict[int, str] = {}
    if rank() == near[0]:
        for place in folder.glob("step-*"):
            if is_published(place):
                here[int(place.name[5:])] = _token(place)
    machines = [found for first, found in gather((near[0] == rank(), here)) if first]
    common = set.intersection(*(set(found.items()) for found in machines))
    for step, _ in sorted(common, reverse=True):
        place = folder / _name(step)
        problems = [p for p in gather(damage(place, near.index(rank()), len(near))) if p]
        if not problems:
            if len(machines) > 1:
                exchange_files(place, "rank-*")
            return place
        if rank() == 0:
            say(f"{problems[0]}: this resume checkpoint is passed over")
    return None


def discard(folder: Path) -> None:
    """Delete a stage's checkpoints, on every node. All ranks call it."""
    shutil.rmtree(folder, ignore_errors=True)


def _share(state: StageState) -> set[str]:
    """The keys of the pieces that this rank writes: of those that several ranks hold, each writes
    some."""
    holders: dict[str, list[int]] = defaultdict(list)
    for r, keys in enumerate(gather([key_of(k, s.name, s.start) for k, s in state.pieces()])):
        for key in keys:
            holders[key].append(r)
    return {k for i, (k, held) in enumerate(holders.items()) if held[i % len(held)] == rank()}


def _near(folder: Path) -> list[int]:
    """The ranks that see the same folder as this one. All ranks call it."""
    first = first_beside(folder)
    return [r for r, f in enumerate(first) if f == first[rank()]]


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _token(folder: Path) -> str:
    try:
        return str(read_manifest(folder)["token"])
    except (ValueError, KeyError, TypeError, OSError):
        return "damaged"


def _write_json(path: Path, content: State) -> None:
    """Whole, under its name."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _delete(folder: Path) -> None:
    """Under another name first: a folder of that name is whole, or damaged by something else."""
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
