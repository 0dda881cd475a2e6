"""Whether ranks that should hold the same bits do: a chip that computes wrongly says nothing."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.config import describe, zero_stage
from pipeline.errors import TrainingStopped, UserError
from pipeline.ranks import gather
from pipeline.recipe import Recipe
from pipeline.shard import Shard


def compare_replicas(engine: Any, step: int) -> None:
    """Hash what each rank holds of each weight, and compare where several hold the same elements.
    All ranks call it.

    Raises:
        TrainingStopped: on every rank, with the rank that differs (from most of the others, where
            there are more than two) and the first weight in which it does.
    """
    parameters = dict(engine.module.named_parameters())
    trained = [n for n, p in parameters.items() if p.requires_grad]
    _compare("weight", engine.shards.weight_shards(list(parameters)), step)
    _compare("fp32 weight", engine.shards.master_shards(trained), step)


def _compare(kind: str, shards: Iterable[Shard], step: int) -> None:
    mine = {(s.name, s.start, s.tensor.numel()): _digest(s.tensor) for s in shards}
    whole = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    place = hashlib.sha256(repr(sorted(mine)).encode()).hexdigest()
    found = set(gather((place, whole)))
    if len(found) == len({p for p, _ in found}):
        return  # those who hold the same elements hold the same bits
    everything = gather(mine)
    for key in sorted({key for held in everything for key in held}):
        values = {r: held[key] for r, held in enumerate(everything) if key in held}
        if len(set(values.values())) == 1:
            continue
        counts = Counter(values.values())
        usual = max(counts.values())
        odd = [r for r, v in values.items() if counts[v] < usual] or list(values)
        ranks = ", ".join(map(str, odd))
        who = f"rank {ranks} differs" if len(odd) == 1 else f"ranks {ranks} differ"
        raise TrainingStopped(
            f"step {step}: {who} in the {kind} {key[0]}, of which ranks hold copies; suspect the "
            "hardware under it. The checkpoints before this step are unharmed"
        )


def check_replicas(recipe: Recipe, engine_config: dict[str, Any], ranks: int) -> None:
    """Raises UserError where `train.compare_replicas` has nothing to compare."""
    if recipe.train.compare_replicas is None:
        return
    if "fsdp" in engine_config:
        several = engine_config["fsdp"]["replicas"] > 1
    else:
        several = zero_stage(engine_config) < 3
    if ranks == 1 or not several:
        raise UserError(
            f"train.compare_replicas: has no effect: with {describe(engine_config)} on {ranks} "
            "rank(s) no two ranks hold the same weights; remove it"
        )


def _digest(tensor: Tensor) -> str:
    """Of a tensor's bits, on its own device: two sums mod 2^64, which any flipped bit changes."""
    bits = tensor.detach().contiguous().view(-1)
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    bits = bits.view(kinds[bits.element_size()])
    first = second = 0
    for at in range(0, bits.numel(), 1 << 24):
        piece = bits[at : at + (1 << 24)].long()
        place = torch.arange(at + 1, at + 1 + piece.numel(), device=piece.device)
        first += int(piece.sum())
        second += int((piece * (place * 2 + 1)).sum())  # wraps around, alike on every rank
    return f"{first & (2**64 - 1):016x}{second & (2**64 - 1):016x}"
