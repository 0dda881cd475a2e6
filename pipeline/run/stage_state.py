"""What a resume checkpoint holds: a stage goes on behind its step in whatever engine, on any ranks.

A checkpoint names weights, not an engine's partitions: every rank writes the pieces it holds, in
fp32 with AdamW's moments, and any rank reads the elements it needs. `pipeline/run/saver.py` writes
and finds them, `pipeline/run/resume.py` says when.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import everywhere
from pipeline.ranks import gather, rank, world_size
from pipeline.run.random_state import set_random_state
from pipeline.run.shard_files import Pieces
from pipeline.shard import Shard, StateShard

STATE = "state.json"  # what is of no rank: the position in the data, the method, ...
State = dict[str, Any]


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
            seed = (self.seed * 1_000_003 + state["step"]) * 100_003 + rank()
            torch.manual_seed(seed % 2**63)
        return state["step"]


def _pieces(shard: StateShard) -> Iterator[tuple[str, Shard]]:
    yield "weight", shard.master
    for moment, tensor in shard.moments.items():
        yield moment, Shard(shard.master.name, tensor, shard.master.start, shard.master.shape)


def _other(name: str, saved: tuple[int, ...] | None, shape: tuple[int, ...]) -> str:
    if saved is None:
        return f"{name} is trained now and was not when it was saved"
    return f"{name} was {list(saved)} and is now {list(shape)}"
