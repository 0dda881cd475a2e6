"""What the optimizer steps on, the same under every engine."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

# Makes a context for the update of the fp32 weights of these names; None: of all.
Hold = Callable[[Collection[str] | None], AbstractContextManager[Any]]

SMALLEST = 2**24  # elements: below that there is little to spare


def weight_groups(
    model: nn.Module, weight_decay: float, largest: int | None = None
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: no weight decay on biases, norms and other vectors.

    largest: elements of a group, of which there are several then; a larger weight has its own.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = []
    for parameters, decay in (
        ([p for p in trained if p.dim() >= 2], weight_decay),
        ([p for p in trained if p.dim() < 2], 0.0),
    ):
        for part in _parts(parameters, largest):
            groups.append({"params": part, "weight_decay": decay})
    return groups


def _parts(parameters: list[nn.Parameter], largest: int | None) -> list[list[nn.Parameter]]:
    parts: list[list[nn.Parameter]] = []
    size = 0
    for p in parameters:
        if not parts or (largest is not None and size + p.numel() > largest):
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts


def zero_groups(model: nn.Module, weight_decay: float, stage: int) -> list[dict[str, Any]]:
    """Those of a ZeRO stage: under 1 and 2 of a sixteenth of the weights each.

    These stages update one group after the other, and meanwhile have its gradient twice more, in
    one piece and in fp32. Of a single group that was 13 GB of 58 for 2.2 billion weights in bf16.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    largest = max(SMALLEST, trained // 16) if stage in (1, 2) else None
    return weight_groups(model, weight_decay, largest)
