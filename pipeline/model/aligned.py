"""Products with some rows of a weight, at the widths that a GPU multiplies fast.

cuBLAS takes three times as long for a half-precision matrix whose rows are not a multiple of 16
bytes (H100, CUDA 13: 3,302 of 11,008 columns), which the number of kept rows rarely is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 64  # of columns


def padded(index: Tensor) -> Tensor:
    """index (int64 [rows]), on a GPU with zeros behind it up to a multiple: rows of a product to
    be left off again."""
    more = aligned(len(index), index.device) - len(index)
    return F.pad(index, (0, more)) if more else index


def aligned(count: int | Tensor, device: torch.device) -> Any:
    """How many rows `padded` makes of so many."""
    return count + -count % MULTIPLE if pads(device) else count


def pads(device: torch.device) -> bool:
    return device.type == "cuda"
