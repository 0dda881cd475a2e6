"""Repair a checkpoint after training: move its weights back toward those it was trained from.

Both ways need two checkpoints and nothing else. Interpolation is WiSE-FT (Wortsman et al. 2022).
The hard threshold is DG-Hard (arXiv 2605.20296): the update of a matrix is taken for a signal of
low rank in noise, and its singular values below the optimal threshold for an unknown noise level
(Gavish and Donoho 2014) are dropped.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.model.lora import is_adapter

Edit = Callable[[Tensor, Tensor], Tensor]  # (base, tuned), fp32 -> repaired


def interpolate(base: Tensor, tuned: Tensor, share: float) -> Tensor:
    """tuned + share * (base - tuned): to the bit the tuned weight at 0, the base at 1."""
    return torch.lerp(tuned, base, share)


def hard_threshold(base: Tensor, tuned: Tensor) -> Tensor:
    """The tuned weight without the singular values of its update that noise explains; of experts in
    one 3-D weight, each by itself. A weight that is no matrix, or did not move, stays as it is."""
    if tuned.dim() > 2:
        return torch.stack([hard_threshold(b, t) for b, t in zip(base, tuned, strict=True)])
    update = tuned - base
    if update.dim() != 2 or not update.any():
        return tuned
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    kept = values > noise_threshold(values, update.shape)
    return base + (left[:, kept] * values[kept]) @ right[kept]


def noise_threshold(values: Tensor, shape: tuple[int, ...] | torch.Size) -> float:
    """Singular values up to here are noise (Gavish and Donoho 2014, section III.E): omega(beta)
    times their median, with omega as the optimal coefficient over the median of the
    Marchenko-Pastur law, beta the aspect ratio of the matrix."""
    beta = min(shape) / max(shape)
    coefficient = math.sqrt(
        2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1))
    )
    return coefficient / math.sqrt(marchenko_pastur_median(beta)) * float(values.median())


def marchenko_pastur_median(beta: float) -> float:
    """Of the eigenvalues of noise of variance 1, by bisection over a numerical integral."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # t = low + (high - low) sin^2: smooth at both ends of the support
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    t = low + (high - low) * angle.sin() ** 2
    density = ((high - t) * (t - low)).clamp_min(0).sqrt() / (2 * math.pi * beta * t)
    weight = torch.nan_to_num(density * 2 * (high - low) * angle.sin() * angle.cos())
    mass = torch.cumulative_trapezoid(weight, angle)
    return float(t[1:][torch.searchsorted(mass, mass[-1] / 2)])


class Weights:
    """Those of a checkpoint's safetensors by name, read one at a time."""

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: there are none, or the folder holds an adapter.
        """
        if is_adapter(folder):
            raise UserError(
                f"{folder} holds an adapter, whose share of the model is its lora_alpha: lower "
                "that in its adapter_config.json instead"
            )
        self.folder = folder
        self.files = sorted(folder.glob("model*.safetensors"))
        if not self.files:
            raise UserError(f"{folder}: no model*.safetensors; give the folder of a checkpoint")
        self._file_of = {
            name: file
            for file in (safe_open(f, "pt") for f in self.files)
            for name in file.keys()  # noqa: SIM118  # not a mapping
        }

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def like(self, name: str, shape: torch.Size) -> Tensor:
        """A weight, fp32. Raises UserError where there is none of this name and shape."""
        if name not in self._file_of:
            raise UserError(
                f"{self.folder} has no weight {name}; give the model it was trained from"
            )
        tensor = self._file_of[name].get_tensor(name)
        if tensor.shape != shape:
            raise UserError(
                f"{self.folder}: {name} is {tuple(tensor.shape)}, not {tuple(shape)}: not the "
                "model it was trained from"
            )
        return tensor.float()


def write_repaired(tuned: Path, base: Path, edit: Edit, folder: Path) -> None:
    """Fill `folder` with the checkpoint `tuned` after the edit, file by file as it lies there; each
    weight keeps its dtype, whole numbers are copied.

    Raises:
        UserError: `base` is not the model that `tuned` was trained from.
    """
    before = Weights(base)
    for file in Weights(tuned).files:
        with safe_open(file, "pt") as tensors:
            weights = {}
            for name in tensors.keys():  # noqa: SIM118
                weight = tensors.get_tensor(name)
                if weight.is_floating_point():
                    start = before.like(name, weight.shape)
                    weight = edit(start, weight.float()).to(weight.dtype).contiguous()
                weights[name] = weight
            save_file(weights, folder / file.name, metadata=tensors.metadata())
    for file in sorted(tuned.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name != "manifest.json":
            shutil.copy2(file, folder / file.name)
