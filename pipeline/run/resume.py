"""Resume checkpoints: a stage goes on behind the step of one, in whatever engine, on any ranks.

A checkpoint names weights, not an engine's partitions: every rank writes the pieces it holds, in
fp32 with AdamW's moments, and any rank reads the elements it needs. `pipeline/run/saver.py` writes
and finds them.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline import signals
from pipeline.errors import everywhere
from pipeline.ranks import any_rank, end_if_asked, gather, rank, world_size
from pipeline.recipe import Resume
from pipeline.run.random_state import set_random_state
from pipeline.run.saver import STATE, Saver, State, newest
from pipeline.run.shard_files import Pieces
from pipeline.shard import Shard, StateShard


class StageState:
    """The live objects of a stage whose states a checkpoint keeps."""

    def __init__(
        self,
        engine: Any,
        batches: Any,
        mask: Any = None,
        methods: Sequence[Any] = (),
        seed: int = 0,
    ):
        """batches: a `StageBatches`, or whatever has its `state_dict`. methods: prepared.

        seed: of the random states where the ranks are others than those that saved.
        """
        self.engine, self.batches, self.mask = engine, batches, mask
        self.methods, self.seed = methods, seed
        self.seconds = 0.0  # of training, in all attempts, up to the last `not_training`
        self.tokens = 0  # trained on, in all attempts
        self._clock: float | None = None  # since when it trains

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """To be entered for what does not count as training, first before the first step."""
        if self._clock is not None:
            self.seconds += time.perf_counter() - self._clock
        try:
            yield
        finally:
            self._clock = time.perf_counter()

    def pieces(self) -> Iterator[tuple[str, Shard]]:
        """Every local tensor of a weight, live, with its kind."""
        for shard in self.engine.state_shards():
            yield from _pieces(shard)
        yield from self._of_methods()

    def _of_methods(self) -> Iterator[tuple[str, Shard]]:
        for method in self.methods:
            for shard in method.state_shards():
                yield method.name, shard

    def of_all(self) -> State:
        """What is of no rank; JSON. All ranks call it."""
        return {
            "data": self.batches.state_dict(),
            "loss_scale": self.engine.loss_scale(),
            "mask": self.mask.state_dict() if self.mask else None,
            "methods": {m.name: m.state_dict() for m in self.methods},
            "seconds": self.seconds,
            "tokens": self.tokens,
            "ranks": world_size(),
        }

    def load(self, folder: Path, position: bool = True) -> int:
        """Be as behind the step of the checkpoint in `folder`, which is returned. All ranks call
        it, before the first step, with the methods prepared.

        position: False leaves the place in the data, the random states and the time as they are; it
            may be at any step.

        Raises:
            UserError: it is of other weights or of other data; on every rank.
        """
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        sides = [json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("rank-*.json"))]
        shapes = {n: tuple(shape) for side in sides for n, shape in side["shapes"].items()}
        steps: dict[str, int] = {}
        for name, step in (item for side in sides for item in side["steps"].items()):
            steps[name] = max(step, steps.get(name, 0))
        records: dict[int, tuple[StateShard, int]] = {}
        problem = None
        with Pieces(sorted(folder.glob("rank-*.safetensors"))) as saved:
            for shard in self.engine.state_shards():
                name = shard.master.name
                if shapes.get(name) != shard.master.shape:
                    problem = problem or _other(name, shapes.get(name), shard.master.shape)
                    continue
                for kind, live in _pieces(shard):
                    problem = problem or saved.fill(live, kind)
                _, known = records.get(id(shard.adam), (shard, 0))
                records[id(shard.adam)] = shard, max(known, steps[name])
            for kind, live in self._of_methods():
                problem = problem or saved.fill(live, kind)
        for text in gather(problem):
            if text is not None:
                raise everywhere(
                    f"cannot continue from {folder}: {text}. Set the model and what is trained of "
                    "it back, or start anew with --restart."
                )
        for shard, step in records.values():
            shard.set_step(step)
        self.engine.state_changed()
        self.engine.load_loss_scale(state["loss_scale"])
        if position:
            self.batches.load_state_dict(state["data"])
        if self.mask:
            self.mask.load_state_dict(state["mask"])
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
        if not position:
            return state["step"]
        self.seconds = state["seconds"]
        self.tokens = state.get("tokens", 0)  # earlier versions did not keep it
        if state["ranks"] == world_size():
            set_random_state(sides[rank()]["random"])
        else:
            torch.manual_seed((self.seed * 1_000_003 + state["step"]) * 100_003 + rank())
        return state["step"]


class Attempt:
    """To train a stage: from where the one before has got to."""

    def __init__(self, folder: Path, settings: Resume | None, state: StageState, steps: int):
        """All ranks make it, when the stage is as it begins.

        Args:
            folder: of the stage's checkpoints. settings: None saves nothing.
            steps: of the stage.
        """
        self.state, self.behind = state, 0
        self._folder, self._settings, self._steps = folder, settings, steps
        self._saver: Saver | None = None
        if settings is not None:
            found = newest(folder)
            if found is not None:
                self.behind = state.load(found)
            self._saver = Saver(folder, settings, state, self.behind)

    def after_step(self, step: int) -> None:
        """Save where it is time to, and end where a rank was asked to. All ranks call it.

        Raises:
            Interrupted: on every rank, when what there is to save is on the disk.
            UserError: on every rank, where nothing can be saved and the recipe stops then.
        """
        saver = self._saver
        asked, late, failed = any_rank(
            signals.asked() is not None,
            saver is not None and saver.late,
            saver is not None and saver.failed,
        )
        last = step == self._steps  # the stage is published
        if failed:
            self.finish()
        if saver is not None and (asked or ((late or saver.due(step)) and not last)):
            saver.save(step)
        if asked:
            self.finish()
            end_if_asked()

    def leave(self, step: int) -> None:
        """What is there behind a step will be on the disk. All ranks call it."""
        if self._saver is not None and self._saver.newest != step:
            self._saver.save(step)
        self.finish()

    def go_back(self) -> int | None:
        """To weights, moments and methods of the newest checkpoint, whose step is returned; the
        place in the data stays. None where there is none. All ranks call it."""
        self.finish()
        found = newest(self._folder) if self._settings is not None else None
        return None if found is None else self.state.load(found, position=False)

    def finish(self) -> None:
        """Wait for what is being written. All ranks call it.

        Raises:
            UserError: on every rank, where it cannot be, and the recipe stops then.
        """
        if self._saver is not None:
            self._saver.finish()


def _pieces(shard: StateShard) -> Iterator[tuple[str, Shard]]:
    yield "weight", shard.master
    for moment, tensor in shard.moments.items():
        yield moment, Shard(shard.master.name, tensor, shard.master.start, shard.master.shape)


def _other(name: str, saved: tuple[int, ...] | None, shape: tuple[int, ...]) -> str:
    if saved is None:
        return f"{name} is trained now and was not when it was saved"
    return f"{name} was {list(saved)} and is now {list(shape)}"
