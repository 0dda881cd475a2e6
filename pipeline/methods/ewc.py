"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796).

The Fisher information of a stage is that of its own steps: the mean over them of the squared
gradient, times the batch size, as in ContinualLM's code; over stages it is averaged. From the
second stage on every gradient gets weight * Fisher * (weights - those at the start of the stage),
which is the gradient of the penalty. All of it is done on the pieces that the engine has.
"""

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.methods.method import Method, Start
from pipeline.methods.weights import copies, masters
from pipeline.nodes import exchange_files
from pipeline.ranks import meet, rank, summed, world_size
from pipeline.recipe import Recipe
from pipeline.shard import Shard, overlap


class Ewc(Method):
    """The recipe's `ewc`."""

    name = "ewc"
    kept_weights = 3
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.ewc is not None
        self.factor, self.batch_size = recipe.ewc.weight, recipe.train.batch_size
        self._goes_on = recipe.bad_steps.policy != "stop"  # behind a step that is left out
        self._engine: Any = None
        self._fisher: dict[str, Shard] = {}  # of the stages before
        self._sums: dict[str, Shard] = {}  # of this one
        self._old: dict[str, Shard] = {}
        self._stages, self._steps = 0, 0
        self._folder: Any = None

    @torch.no_grad()
    def prepare(self, start: Start) -> None:
        self._engine = start.engine
        self._old = {s.name: s for s in copies(start.engine)}
        self._sums, self._fisher = _zeros(self._old), _zeros(self._old)
        self._folder, self._stages, self._steps = start.kept / "ewc", start.stage - 1, 0
        if self._stages:
            kept = self._folder / f"stage-{self._stages:02d}"
            exchange_files(kept, "rank-*.safetensors")
            _read(kept, self._fisher)

    @torch.no_grad()
    def edit(self, shards: Any, step: int, lr: float) -> None:
        if self._goes_on and not self._finite(shards):
            return  # the step will be left out, and would be in the sums for ever
        self._steps += 1
        now = {s.name: s for s in masters(self._engine)} if self._stages else {}
        for gradient in shards.gradient_shards(list(self._sums)):
            total = self._sums[gradient.name]
            here, there = overlap(gradient, total)
            total.tensor[there] += gradient.tensor[here].float() ** 2
            if self._stages:
                name = gradient.name
                moved = now[name].tensor[there] - self._old[name].tensor[there]
                penalty = self.factor * self._fisher[name].tensor[there] * moved
                gradient.tensor[here] += penalty.to(gradient.tensor.dtype)

    @torch.no_grad()
    def finish(self, engine: Any, stage: int) -> None:
        for name, total in self._sums.items():
            new = total.tensor * (self.batch_size / max(self._steps, 1))
            fisher = self._fisher[name].tensor
            fisher.mul_(self._stages).add_(new).div_(self._stages + 1)
        folder = self._folder / f"stage-{stage:02d}"
        folder.mkdir(parents=True, exist_ok=True)  # on each node
        for path in folder.glob("rank-*.safetensors"):  # of an attempt with more ranks
            if int(path.stem[5:]) >= world_size():
                path.unlink(missing_ok=True)
        pieces = {f"{s.start}:{n}": s.tensor.contiguous() for n, s in self._fisher.items()}
        save_file(pieces, folder / f"rank-{rank():04d}.safetensors")
        meet()

    def _finite(self, shards: Any) -> bool:
        """Whether all squares of the step's gradient are numbers; the same on every rank."""
        total = torch.zeros((), device=self._engine.device)
        for gradient in shards.gradient_shards(list(self._sums)):
            total += gradient.tensor.float().square().sum().to(total.device)
        return bool(summed(total, self._engine.device).isfinite())

    def state_shards(self) -> Iterator[Shard]:
        for name, total in self._sums.items():
            yield Shard(f"ewc:{name}", total.tensor, total.start, total.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])


def _zeros(shards: dict[str, Shard]) -> dict[str, Shard]:
    return {n: Shard(n, torch.zeros_like(s.tensor), s.start, s.shape) for n, s in shards.items()}


def _read(folder: Any, shards: dict[str, Shard]) -> None:
    """Fill shards from the pieces of any number of ranks."""
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                start, name = key.split(":", 1)
                if name in shards:
                    piece = Shard(name, file.get_tensor(key), int(start), shards[name].shape)
                    here, there = overlap(piece, shards[name])
                    if here.stop > here.start:
                        shards[name].tensor[there] = piece.tensor[here].to(
                            shards[name].tensor.device
                        )
