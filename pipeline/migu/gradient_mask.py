"""The mask of a training run: record, select, apply."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import select_rows
from pipeline.migu.targets import find_targets
from pipeline.shard import Shard


class ShardedModel(Protocol):
    """Where a model's gradients and weights are on this rank: `engine.shards`."""

    def gradient_shards(self, names: list[str]) -> Iterator[Shard]: ...
    def weight_shards(self, names: list[str]) -> Iterator[Shard]: ...
    def master_shards(self, names: list[str]) -> Iterator[Shard]: ...


class NonFiniteMagnitude(RuntimeError):
    """An output was NaN or infinite. Raised on every rank alike, before the optimizer step."""


class GradientMask:
    """Keeps, in each target's gradient, the rows that the criterion ranks highest.

    settings has the fields of `recipe.Mask`. Used as:

        with mask.recording(real):  # which tokens of the micro-batch are no padding
            loss = forward(micro_batch)
        backward(loss)
        ...
        mask.apply(engine.shards, step)  # after the last micro-batch, before clipping and the step
        engine.step(lr, hold=partial(mask.hold, engine.shards))
    """

    def __init__(self, model: nn.Module, settings: Any, seed: int):
        self.settings = settings
        self.seed = seed
        self.targets = find_targets(model, settings.components, settings.split_fused)
        self.sizes = [t.rows for t in self.targets]
        self.parts = [part for t in self.targets for part in t.parts]
        self.recorder = (
            MagnitudeRecorder(self.targets, settings.normalize)
            if settings.criterion == "output"
            else None
        )
        self.keep: Tensor | None = None  # bool [sum of rows], the last step's selection

    def recording(
        self, real: Tensor | None = None, decoder: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """To be entered around the forward of a micro-batch; see `MagnitudeRecorder.recording`."""
        return self.recorder.recording(real, decoder) if self.recorder else nullcontext()

    @torch.no_grad()
    def apply(self, shards: ShardedModel, step: int) -> float:
        """Mask the reduced gradients of this step in place; returns the fraction of kept rows.

        Of a target that took no part in the step no row is kept.

        Raises:
            NonFiniteMagnitude: the scores cannot be ranked; on every rank alike.
            UserError: a target has a gradient, but no output of it was observed to rank its rows
                by; on every rank alike.
        """
        scores = self._scores(shards, step)
        if not scores.any():
            raise RuntimeError("the mask recorded no forward of this step: nothing to rank rows by")
        finite = torch.isfinite(scores)
        if not finite.all():
            layer = self._layer_of(int((~finite).nonzero()[0]))
            raise NonFiniteMagnitude(f"non-finite {self.settings.criterion} magnitude in {layer}")
        self.keep = select_rows(scores, self.parts, self.settings.threshold, self.settings.rule)
        rows = self.rows_by_name(self.keep)
        for name in self._unobserved(shards):
            rows[name][0].fill_(False)
        for shard in shards.gradient_shards([t.name for t in self.targets]):
            keep, output_dim = rows[shard.name]
            shard.mask(keep.to(shard.tensor.device), output_dim)
        return float(self.keep.sum()) / self.keep.numel()

    @contextmanager
    @torch.no_grad()
    def hold(self, shards: ShardedModel) -> Iterator[None]:
        """To be entered around the optimizer's update. Under `update: strict` the masked rows come
        out of it as they went in: neither momentum nor weight decay moves them. Their moments decay
        as under a zero gradient.
        """
        if self.settings.update == "gradient" or self.keep is None:
            yield
            return
        rows = self.rows_by_name(self.keep)
        held = list(shards.master_shards([t.name for t in self.targets]))
        before = [shard.tensor.clone() for shard in held]
        yield
        for shard, old in zip(held, before, strict=True):
            keep, output_dim = rows[shard.name]
            shard.restore(old, keep.to(old.device), output_dim)

    def rows_by_name(self, flat: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Per target, its part of a flat [sum of rows] tensor (a view) and its output dimension."""
        parts = flat.split(self.sizes)
        return {t.name: (p, t.output_dim) for t, p in zip(self.targets, parts, strict=True)}

    def close(self) -> None:
        if self.recorder:
            self.recorder.close()

    def _scores(self, shards: ShardedModel, step: int) -> Tensor:
        criterion = self.settings.criterion
        if self.recorder:
            return self.recorder.reduce()
        device = self.targets[0].weight.device
        if criterion == "random":  # drawn on the CPU: the same rows on every rank and device
            seed = self.seed * 1_000_003 + (step if self.settings.random_redraw == "step" else 0)
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(sum(self.sizes), generator=generator).to(device)
        scores = torch.zeros(sum(self.sizes), device=device)
        rows = self.rows_by_name(scores)
        names = [t.name for t in self.targets]
        weights = criterion == "weight"
        for shard in shards.weight_shards(names) if weights else shards.gradient_shards(names):
            shard.add_magnitudes(*rows[shard.name])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(scores)
        return scores

    def _unobserved(self, shards: ShardedModel) -> list[str]:
        """Targets without an output in this step: experts that got no token, say."""
        if self.recorder is None or self.recorder.observed.all():
            return []
        seen = self.recorder.observed.tolist()
        names = [t.name for t, yes in zip(self.targets, seen, strict=True) if not yes]
        place = {name: i for i, name in enumerate(names)}
        gradient = torch.zeros(len(names), device=self.recorder.observed.device)
        for shard in shards.gradient_shards(names):
            gradient[place[shard.name]] += shard.tensor.count_nonzero()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gradient)
        for name, count in zip(names, gradient.tolist(), strict=True):
            if count:
                raise UserError(
                    f"mask: {name} has a gradient in this step, but its layer was not called in a "
                    "recorded forward (its weight is used elsewhere, or a compiled model ran "
                    "before the mask came), so its rows cannot be ranked. Leave the layer out "
                    "with mask.components, or choose another mask.criterion."
                )
        return names

    def _layer_of(self, row: int) -> str:
        for target in self.targets:
            if row < target.rows:
                return target.name
            row -= target.rows
        raise IndexError(row)
