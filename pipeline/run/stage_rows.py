"""`mask.refresh: stage`: the rows of a stage, chosen before it begins, and the model split by them.

The rows come from the magnitudes of the stage's first sequences (or their Fisher information), by
the weights that it starts from. They are kept beside the stage's checkpoint, so that a stage that
is continued, on other ranks too, has the same ones.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.checkpoint import is_published, publish, verify
from pipeline.engine.config import DTYPES, precision_of
from pipeline.errors import UserError
from pipeline.migu.fisher import FisherRecorder
from pipeline.migu.gradient_mask import GradientMask, NonFiniteMagnitude
from pipeline.migu.row_sparse import require_plain_linears
from pipeline.migu.targets import Target, find_targets
from pipeline.model.attention import Separation, arrange
from pipeline.model.load import summed_loss
from pipeline.model.split_linear import require_splittable, split_linears, split_parts
from pipeline.nodes import send_folder
from pipeline.progress import say
from pipeline.ranks import on_rank0, rank
from pipeline.recipe import Mask, Recipe
from pipeline.shard import ParameterShards

ROWS = "rows"  # the folder beside a stage's checkpoint
Batches = Iterable[list[dict[str, Tensor]]]


def split_stage(recipe: Recipe, stage: int) -> int | None:
    """The stage by whose rows the model is split while it trains `stage`; None: it is whole."""
    mask = recipe.mask
    splits = mask.enabled and mask.refresh == "stage" and stage >= mask.from_stage
    return stage if splits else None


def masked_targets(model: nn.Module, mask: Mask) -> list[Target]:
    """What the mask of a run masks, of its model without weights.

    Raises:
        UserError: what `find_targets`, `mask.backward` or `mask.refresh` cannot take.
    """
    targets = find_targets(model, mask.components, mask.split_fused)
    if mask.backward != "dense":
        require_plain_linears(model, targets)
    if mask.refresh == "stage":
        require_splittable(model, [t.name for t in targets])
    return targets


def split_for_stage(
    net: nn.Module,
    recipe: Recipe,
    engine_config: dict[str, Any],
    stage: int,
    folder: Path,
    separation: Separation | None,
    batches: Callable[[], Batches],
) -> None:
    """Split the linears of a model, on the CPU and of no engine yet, by the rows of a stage.

    All ranks call it.

    Args:
        folder: of the stage; what it has of the rows is taken.
        batches: begins this rank's micro-batches of the stage, step by step.

    Raises:
        UserError: a linear that cannot be split; the model does not fit on one device.
    """
    target = folder / ROWS
    if not on_rank0(partial(is_published, target)):
        if rank() == 0:
            say(f"stage {stage}: choosing the rows that it trains")
        rows = _choose(net, recipe, engine_config, stage, separation, batches)
        files = {n: k.to("cpu", torch.uint8) for n, k in rows.items()}

        def write(folder: Path) -> None:
            save_file(files, folder / "rows.safetensors")

        on_rank0(lambda: publish(target, write, {"stage": stage}))
    send_folder(target)
    on_rank0(partial(verify, target))
    found = load_file(target / "rows.safetensors")
    split_linears(net, {n: k.bool() for n, k in found.items()})


def _choose(
    net: nn.Module,
    recipe: Recipe,
    engine_config: dict[str, Any],
    stage: int,
    separation: Separation | None,
    batches: Callable[[], Batches],
) -> dict[str, Tensor]:
    """bool [output features] by weight name, alike on every rank."""
    settings = replace(recipe.mask, refresh=1, backward="dense")
    try:
        with _on_device(net, precision_of(engine_config)) as device:
            mask = GradientMask(net, settings, recipe.stage_seed(stage))
            try:
                if mask.recorder is not None:
                    _calibrate(net, mask, recipe, separation, batches(), device)
                mask.select(ParameterShards(net), 1)
            finally:
                mask.close()
    except NonFiniteMagnitude as error:
        raise UserError(f"stage {stage}: cannot choose the rows that it trains: {error}") from None
    except torch.OutOfMemoryError:
        raise UserError(
            "mask.refresh: stage runs the whole model on each device once, before it is sharded, "
            "and it does not fit; choose mask.backward=row_sparse instead"
        ) from None
    assert mask.keep is not None
    return {name: keep for name, (keep, _) in mask.rows_by_name(mask.keep).items()}


def _calibrate(
    net: nn.Module,
    mask: GradientMask,
    recipe: Recipe,
    separation: Separation | None,
    batches: Batches,
    device: torch.device,
) -> None:
    """Passes over the stage's first sequences, without dropout."""
    steps = -(-recipe.mask.calibration // recipe.train.batch_size)
    net.eval()
    for _, micro_batches in zip(range(steps), batches, strict=False):
        for waiting in micro_batches:
            batch = {k: v.to(device) for k, v in waiting.items()}
            if isinstance(mask.recorder, FisherRecorder):
                for i in range(len(batch["labels"])):
                    one = {k: v[i : i + 1] for k, v in batch.items()}
                    summed_loss(net, one, separation, recipe.model.objective)[0].backward()
                    mask.recorder.add()
                continue
            inputs, tokens = arrange(batch, separation, net)
            with torch.no_grad(), mask.recording(tokens.get("real"), tokens.get("decoder_real")):
                net(**inputs)
    net.zero_grad(set_to_none=True)
    net.train()
    if close := getattr(batches, "close", None):
        close()


@contextmanager
def _on_device(net: nn.Module, precision: str) -> Iterator[torch.device]:
    """The model on this rank's GPU in the training precision, and back; on a CPU as it is."""
    if not torch.cuda.is_available():
        yield torch.device("cpu")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = DTYPES[precision]
    tensors = [*net.parameters(), *net.buffers()]
    there = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.to(device, dtype if t.is_floating_point() else None)
        yield device
    finally:
        for t, data in zip(tensors, there, strict=True):
            t.data = data
        torch.cuda.empty_cache()


class FrozenRows:
    """Stands where a step has its mask: the other rows are no parameters that are trained."""

    defers = False

    def __init__(self, net: nn.Module):
        self.targets: list[Target] = []
        parts = split_parts(net).values()
        self._kept = sum(p.kept_rows for p in parts) / sum(p.out_features for p in parts)

    def select(self, *_: Any) -> None:
        pass

    def forget(self, *_: Any) -> None:
        pass

    def recording(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def apply(self, *_: Any, **__: Any) -> float:
        return self._kept

    def hold(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def all_rows(self) -> AbstractContextManager[None]:
        raise RuntimeError("the other rows are frozen")  # `anchor_problems`

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def mask_of_stage(
    net: nn.Module, recipe: Recipe, stage: int, groups: dict[str, Tensor] | None = None
) -> GradientMask | FrozenRows | None:
    """What masks the steps of a stage of the engine's model; None: it is dense.

    groups: of `row_groups`.
    """
    if not recipe.mask.enabled or stage < recipe.mask.from_stage:
        return None
    if recipe.mask.refresh == "stage":
        return FrozenRows(net)
    return GradientMask(net, recipe.mask, recipe.stage_seed(stage), groups)
