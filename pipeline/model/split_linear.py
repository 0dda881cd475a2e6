"""Linears in two parts: rows that are trained, and the others, which are frozen.

To whatever trains the model the kept rows are a parameter like any other. The masked rows have no
gradient, no fp32 master and no moment, and nothing reduces, steps, offloads or saves any for them:
not because somebody leaves them out, but because they do not exist.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.model.aligned import padded


class SplitLinear(nn.Module):
    """What the linear that it replaces computes, of the same weight in two parts.

    kept: [kept rows, in], trained; rest: [other rows, in], frozen; index: int64 [rows], where the
    rows of [kept; rest] are in the weight; kept_rows: how many of them are trained.
    """

    index: Tensor

    def __init__(self, linear: nn.Module, keep: Tensor):
        """
        Args:
            linear: an nn.Linear or Conv1D.
            keep: bool [output features].
        """
        super().__init__()
        self.transposed = isinstance(linear, Conv1D)  # its weight is [in, out]
        weight: Tensor = linear.weight.detach()  # type: ignore[assignment, operator]
        self.out_features, self.in_features = weight.shape[:: -1 if self.transposed else 1]
        rows = weight.t() if self.transposed else weight
        parts = [k.nonzero().view(-1).to(weight.device) for k in (keep, ~keep)]
        self.kept = nn.Parameter(rows.index_select(0, parts[0]))
        self.rest = nn.Parameter(rows.index_select(0, parts[1]), requires_grad=False)
        self.kept_rows = len(parts[0])  # also where an engine has sharded them
        self.bias = linear.bias
        self.register_buffer("index", torch.cat(parts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.kept
        rest: Tensor = self.rest
        bias: Any = self.bias
        if dtype := autocast_dtype(x):
            x, kept, rest = x.to(dtype), kept.to(dtype), rest.to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        return _Split.apply(x, kept, rest, bias, self.index)

    @property
    def weight(self) -> Tensor:
        """For models that look at the dtype of a linear's weight (T5)."""
        return self.kept

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kept={self.kept_rows}"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """To which the library's own linear casts its inputs; None: to none."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class _Split(torch.autograd.Function):
    """The weight is put together for each product and not kept: its rows are copied in a fiftieth
    of the product's time, where putting outputs in order takes as long as the product (CPU)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor, rest: Tensor, bias: Tensor | None, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, kept, rest, index)
        return F.linear(x, merge_rows(kept, rest, index), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, kept, rest, index = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_kept = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (outer @ merge_rows(kept, rest, index)).view(x.shape)
        if ctx.needs_input_grad[1]:
            inner = x.reshape(-1, x.shape[-1])
            trained = padded(index[: kept.shape[0]])
            of_kept = (outer.index_select(1, trained).t() @ inner)[: kept.shape[0]]
        if ctx.needs_input_grad[3]:
            of_bias = outer.sum(0)
        return of_x, of_kept, None, of_bias, None


def merge_rows(kept: Tensor, rest: Tensor, index: Tensor) -> Tensor:
    """[rows, in], of `kept`'s dtype: row index[i] is row i of [kept; rest]."""
    whole = kept.new_empty(index.numel(), kept.shape[1])
    count = kept.shape[0]
    for rows, at in ((kept, index[:count]), (rest.to(kept.dtype), index[count:])):
        if all(map(_in_words, (whole, rows))):
            whole.view(torch.int64).index_copy_(0, at, rows.view(torch.int64))
        else:
            whole.index_copy_(0, at, rows)
    return whole


def _in_words(rows: Tensor) -> bool:
    """Whether a matrix of half-precision numbers is one of 8-byte numbers too: rows are copied
    number by number, which takes a GPU twice as long as its memory does."""
    size = rows.element_size()
    places = rows.shape[1] * size, rows.storage_offset() * size
    return size == 2 and rows.is_contiguous() and not any(place % 8 for place in places)


def split_linears(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Replace linears of a model by `SplitLinear`s, in place.

    Args:
        rows: bool [output features] by the weight's name; True: trained.

    Raises:
        UserError: as `require_splittable`.
    """
    require_splittable(model, rows)
    for name, keep in rows.items():
        path, _, _ = name.rpartition(".")
        parent, _, child = path.rpartition(".")
        split = SplitLinear(model.get_submodule(path), keep)
        setattr(model.get_submodule(parent), child, split)


def require_splittable(model: nn.Module, names: Iterable[str]) -> None:
    """Raises UserError where one of the named weights is not a linear's own: quantized, an
    adapter's, an expert's, tied to another."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            users.setdefault(id(p), []).append(name)
    for name in names:
        path, _, last = name.rpartition(".")
        linear = model.get_submodule(path)
        if last != "weight" or type(linear).forward not in (nn.Linear.forward, Conv1D.forward):
            raise UserError(
                f"mask.refresh: stage splits plain linears, and {path} is a "
                f"{type(linear).__name__}; leave it out with mask.components"
            )
        if len(shared := users[id(linear.weight)]) > 1:
            raise UserError(
                f"mask.refresh: stage cannot split {name}, which is tied to a weight of "
                f"{next(s for s in shared if s != path)}; leave it out with mask.components"
            )


def split_parts(model: nn.Module) -> dict[str, SplitLinear]:
    """By path; empty where nothing is split."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SplitLinear)}


def is_split(model: nn.Module) -> bool:
    return any(isinstance(m, SplitLinear) for m in model.modules())


def merge_weights(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Weights of a split model, whole and in the order of its parameters, as those of the ordinary
    model: under their ordinary names and in their ordinary shapes. Of a model that is not split
    they pass as they are."""
    parts = split_parts(model)
    waiting: dict[str, Tensor] = {}
    for name, weight in weights:
        path, _, last = name.rpartition(".")
        if path not in parts or last == "bias":
            yield name, weight
        elif last == "kept":
            waiting[path] = weight
        else:
            module = parts[path]
            kept = waiting.pop(path)
            whole = merge_rows(kept, weight.to(kept.device), module.index.to(kept.device))
            yield f"{path}.weight", whole.t() if module.transposed else whole


def set_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a model that is not split other tensors for its weights."""
    for name, weight in weights:
        model.get_parameter(name).data = weight
