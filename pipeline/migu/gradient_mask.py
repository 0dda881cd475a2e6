"""The mask of a training run: record, select, apply."""

import base64
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import TrainingStopped, UserError
from pipeline.migu.clusters import group_means, grouped
from pipeline.migu.fisher import FisherRecorder
from pipeline.migu.magnitude import MagnitudeRecorder
from pipeline.migu.mask import select_rows
from pipeline.migu.row_sparse import RowSparseLinears
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

    With `backward: row_sparse` the backwards compute the kept rows only. So where `defers` says it
    of a step, all its forwards come first, then `mask.select(engine.shards, step)`, then its
    backwards. With `backward: previous` they have the rows of the step before.
    """

    def __init__(
        self, model: nn.Module, settings: Any, seed: int, groups: dict[str, Tensor] | None = None
    ):
        """groups: by a layer's weight, of each row the group whose mean score it has."""
        self.settings = settings
        self.seed = seed
        self.targets = find_targets(model, settings.components, settings.split_fused)
        self.sizes = [t.rows for t in self.targets]
        self.parts = [part for t in self.targets for part in t.parts]
        self.sparse = (
            RowSparseLinears(model, self.targets) if settings.backward != "dense" else None
        )
        self.groups = grouped(self.targets, groups) if groups is not None else None
        self.recorder: Any = None
        if settings.criterion == "output":
            self.recorder = MagnitudeRecorder(self.targets, settings.normalize)
        elif settings.criterion == "fisher":
            self.recorder = FisherRecorder(self.targets)
        self.keep: Tensor | None = None  # bool [sum of rows], the last step's rows
        self._kept = 0.0  # their fraction
        self._counts: list[int] | None = None  # of each target, with a row-sparse backward
        self._coming: tuple[Tensor, float] | None = None  # `backward: previous`: the next step's
        self._age = 0  # steps since the last selection
        self._step: int | None = None  # the one that `_before` is from before
        self._before: tuple[Any, ...] = ()
        self._shown = False  # that the backwards leave the other rows out
        self._opened = False  # by `all_rows`, in this step
        self._signs: Tensor | None = None  # int64 [sum of rows]: random numbers, alike on all ranks

    @property
    def selects(self) -> bool:
        """Whether rows are still to be selected in this step; else those that are known serve."""
        return self.keep is None or self._age >= self.settings.refresh

    @property
    def defers(self) -> bool:
        """Whether the backwards of this step wait for `select`."""
        return self.settings.backward == "row_sparse" and self.selects

    @property
    def selected(self) -> bool:
        """Whether `select` was called and `apply` was not yet."""
        return self.keep is not None and self._age == 0

    def forget(self, step: int) -> None:
        """The step is dropped: those that follow go on as if it had not been."""
        if step != self._step:  # it has not come to the mask
            return
        self.keep, self._kept, self._counts, self._coming, self._age = self._before
        self._step, self._opened = None, False
        if self.sparse:
            self.sparse.keep(self._coming[0] if self._coming else self.keep, self._counts)

    def _begin(self, step: int) -> None:
        if step != self._step:
            self._step = step
            self._before = self.keep, self._kept, self._counts, self._coming, self._age

    def recording(
        self, real: Tensor | None = None, decoder: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """To be entered around the forward of a micro-batch; see `MagnitudeRecorder.recording`."""
        if self.recorder is None or not (self.selects or self.selected):
            return nullcontext()
        return self.recorder.recording(real, decoder)

    @torch.no_grad()
    def select(self, shards: ShardedModel, step: int) -> None:
        """Select the rows of this step from its forwards.

        Of a target, or an expert, that took no part in the step no row is kept.

        Raises:
            NonFiniteMagnitude: the scores cannot be ranked; on every rank alike.
            TrainingStopped: the ranks have selected other rows; on every rank alike.
            UserError: a target has a gradient, but no output of it was observed to rank its rows
                by; on every rank alike.
        """
        self._begin(step)
        self.keep, self._kept = self._select(shards, step)
        self._age = 0
        if self.sparse:
            self.sparse.keep(self.keep, self._counts)

    @torch.no_grad()
    def apply(self, shards: ShardedModel, step: int, edited: bool = False) -> float:
        """Mask the reduced gradients of this step in place; returns the fraction of kept rows.

        edited: something besides the backwards has written into the gradients.

        Raises:
            NonFiniteMagnitude, UserError: as `select`, where that is still to be done.
            UserError: a row-sparse gradient has other rows too.
        """
        self._begin(step)
        dense = self.sparse is None
        if self.defers:
            raise RuntimeError("backward: row_sparse: `select` was not called before the backward")
        if self.settings.backward == "previous":
            dense = self._coming is None
            self._apply_previous(shards, step)
        elif self.selects:
            self.select(shards, step)
        self._age += 1
        if self._opened:  # the backwards have left out what is masked of the new text
            self._opened = False
        elif dense or edited:
            rows = self.rows_by_name(self.keep)  # type: ignore[arg-type]
            for shard in shards.gradient_shards([t.name for t in self.targets]):
                keep, output_dim = rows[shard.name]
                shard.mask(keep.to(shard.tensor.device), output_dim)
        elif not self._shown:
            self._require_sparse(shards)
        return self._kept

    @contextmanager
    def all_rows(self) -> Iterator[None]:
        """Backwards within it, behind those of the new text, are not masked, nor is whatever else
        is added to the gradients of this step; with `backward: row_sparse`."""
        assert self.sparse is not None
        assert self.keep is not None
        self._opened = True
        self.sparse.keep(None)
        yield
        self.sparse.keep(self.keep, self._counts)

    def _apply_previous(self, shards: ShardedModel, step: int) -> None:
        """The rows of this step are those that the last one selected; the first step has its own,
        and a dense backward."""
        assert self.sparse is not None
        selected = None
        if self.selects:
            selected, self._age = self._select(shards, step), 0
        known = self._coming or selected
        assert known is not None
        self.keep, self._kept = known
        if selected is not None:
            self._coming = selected
            self.sparse.keep(selected[0], self._counts)

    def _select(self, shards: ShardedModel, step: int) -> tuple[Tensor, float]:
        """(keep, the fraction that it keeps). The host waits for the device once."""
        scores = self._scores(shards, step)
        if self.groups is not None:
            scores = group_means(scores, self.groups)
        keep = select_rows(scores, self.parts, self.settings.threshold, self.settings.rule)
        seen = self.recorder.observed if self.recorder else torch.ones_like(keep)
        differs = self._differs(keep)
        facts = [scores.any(), scores.isfinite().all(), seen.all(), differs.any(), keep.sum()]
        counts = self.sparse.counts(keep) if self.sparse else keep.new_zeros(0, dtype=torch.int64)
        known = torch.cat([torch.stack([f.long() for f in facts]), counts]).tolist()
        (some, finite, all_seen, differ, kept), self._counts = known[:5], known[5:]
        if not some:
            raise RuntimeError("the mask recorded no forward of this step: nothing to rank rows by")
        if not finite:
            layer = self._layer_of(int((~scores.isfinite()).nonzero()[0]))
            raise NonFiniteMagnitude(f"non-finite {self.settings.criterion} magnitude in {layer}")
        if differ:
            layer = self.targets[int(differs.nonzero()[0])].name
            stopped = TrainingStopped(f"the mask: the ranks have selected other rows of {layer}")
            stopped.everywhere = True  # type: ignore[attr-defined]
            raise stopped
        if not all_seen:
            self._require_observed(shards)
            keep &= seen.repeat_interleave(torch.tensor(self.parts, device=seen.device))
            kept = int(keep.sum())
            self._counts = None  # to be counted anew
        return keep, kept / keep.numel()

    @contextmanager
    @torch.no_grad()
    def hold(self, shards: ShardedModel, names: Collection[str] | None = None) -> Iterator[None]:
        """To be entered around the optimizer's update. Under `update: strict` the masked rows come
        out of it as they went in: neither momentum nor weight decay moves them. Their moments decay
        as under a zero gradient.

        names: of the weights that are updated within it; None: of all.
        """
        if self.settings.update == "gradient" or self.keep is None:
            yield
            return
        rows = self.rows_by_name(self.keep)
        updated = [n for n in rows if names is None or n in names]
        held = list(shards.master_shards(updated))
        before = [shard.tensor.clone() for shard in held]
        yield
        for shard, old in zip(held, before, strict=True):
            keep, output_dim = rows[shard.name]
            shard.restore(old, keep.to(old.device), output_dim)

    def rows_by_name(self, flat: Tensor) -> dict[str, tuple[Tensor, int]]:
        """Per target, its part of a flat [sum of rows] tensor (a view) and its output dimension."""
        parts = flat.split(self.sizes)
        return {t.name: (p, t.output_dim) for t, p in zip(self.targets, parts, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The rows that later steps go on with; JSON, the same on every rank."""
        coming = self._coming and [_as_text(self._coming[0]), self._coming[1]]
        keep = None if self.keep is None else [_as_text(self.keep), self._kept]
        return {"keep": keep, "coming": coming, "age": self._age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step that `state` is of, on any number of ranks."""

        def rows(known: tuple[str, float] | None) -> tuple[Tensor, float] | None:
            if known is None:
                return None
            keep = _from_text(known[0], sum(self.sizes))
            return keep.to(self.targets[0].weight.device), known[1]

        self._step = None
        self._coming, self._age = rows(state["coming"]), state["age"]
        known = rows(state["keep"])
        if known is not None:
            self.keep, self._kept = known
            if self.sparse:
                self.sparse.keep((self._coming or known)[0])

    def close(self) -> None:
        if self.recorder:
            self.recorder.close()
        if self.sparse:
            self.sparse.close()

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

    def _require_observed(self, shards: ShardedModel) -> None:
        """Raises UserError where a target without an output in this step has a gradient; those
        that have none were not called: an expert, say, that got no token."""
        if self.settings.backward == "row_sparse":  # no gradient yet: see `_require_sparse`
            return
        seen = [any(p.tolist()) for p in self.recorder.observed.split(self.recorder.part_counts)]
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

    def _differs(self, keep: Tensor) -> Tensor:
        """bool [targets], alike on every rank: where the ranks have selected other rows."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return torch.zeros(len(self.targets), dtype=torch.bool, device=keep.device)
        if self._signs is None:
            generator = torch.Generator().manual_seed(0)
            self._signs = torch.randint(2**40, keep.shape, generator=generator).to(keep.device)
        sums = torch.stack([p.sum() for p in (self._signs * keep).split(self.sizes)])
        both = torch.stack([sums, -sums])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return both[0] != -both[1]

    def _require_sparse(self, shards: ShardedModel) -> None:
        """Shows once that the backwards give the gradient of the kept rows alone."""
        assert self.keep is not None
        sums = torch.zeros(self.keep.shape, device=self.keep.device)
        rows = self.rows_by_name(sums)
        for shard in shards.gradient_shards([t.name for t in self.targets]):
            shard.add_magnitudes(*rows[shard.name])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        others = (sums != 0) & ~self.keep
        if others.any():
            layer = self._layer_of(int(others.nonzero()[0]))
            raise UserError(
                f"mask.backward: {layer} has a gradient in masked rows too: its weight is used "
                "elsewhere than in its layer; set mask.backward=dense"
            )
        self._shown = True

    def _layer_of(self, row: int) -> str:
        for target in self.targets:
            if row < target.rows:
                return target.name
            row -= target.rows
        raise IndexError(row)


def _as_text(keep: Tensor) -> str:
    return base64.b64encode(np.packbits(keep.cpu().numpy()).tobytes()).decode()


def _from_text(text: str, rows: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=rows)
    return torch.from_numpy(bits).bool()
