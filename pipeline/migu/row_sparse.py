"""Linears that compute the kept rows of their weight's gradient, and no others.

The rows are known before the backward, since they follow from the outputs of the forward. So the
product of a linear's backward that gives the weight's gradient, a third of a layer's work, is done
for the kept rows alone, and the others are zero without having been computed. The kept rows have
the bits that the whole product would give them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.migu.targets import Target
from pipeline.model.aligned import aligned
from pipeline.model.blocks import is_adapted
from pipeline.model.split_linear import autocast_dtype

ADVICE = "set mask.backward=dense, or leave the layer out with mask.components"


class RowSparseLinears:
    """The linears of `targets`, whose next backwards compute the rows that `keep` was told last;
    every row before it was told any.

    Raises:
        UserError: as `require_plain_linears`.
    """

    def __init__(self, model: nn.Module, targets: list[Target]):
        require_plain_linears(model, targets)
        self._rows = [_Rows() for _ in targets]
        self._sizes = [t.rows for t in targets]
        # int64 [2, sum of rows]: of each row its number within its target, and which target that
        # is; moves to where they train
        numbers = [torch.arange(size) for size in self._sizes]
        owners = [torch.full_like(own, i) for i, own in enumerate(numbers)]
        self._places = torch.stack([torch.cat(numbers), torch.cat(owners)])
        self._targets = targets
        self.open()

    def open(self) -> None:
        """The linears compute in this way; done at the start."""
        for target, rows in zip(self._targets, self._rows, strict=True):
            target.observed.forward = _forward(target.observed, rows, target.output_dim)  # type: ignore[assignment]

    def counts(self, keep: Tensor) -> Tensor:
        """int64 [targets]: how many rows of each are kept."""
        _, owners = self._places_on(keep.device)
        counts = keep.new_zeros(len(self._rows), dtype=torch.int64)
        return counts.index_add_(0, owners, keep.long())

    def keep(self, keep: Tensor | None, counts: list[int] | None = None) -> None:
        """keep: bool [sum of rows], the targets one after the other; None: every row.
        counts: as `counts` says; without them the host waits for a GPU."""
        if keep is None:
            for rows in self._rows:
                rows.index = None
            return
        numbers, owners = self._places_on(keep.device)
        each = self.counts(keep)
        counts = each.tolist() if counts is None else counts
        within = keep.cumsum(0) - 1 - (each.cumsum(0) - each)[owners]
        sources = torch.where(keep, within, each[owners]).split(self._sizes)
        # The kept rows' numbers, each target's at its place, behind them the others'.
        widths = [aligned(count, keep.device) for count in counts]
        width = aligned(each, keep.device)
        places = torch.where(keep, within + (width.cumsum(0) - width)[owners], sum(widths))
        kept = numbers.new_zeros(sum(widths) + 1).scatter_(0, places, numbers)
        parts = kept[:-1].split(widths)
        for rows, index, source, count in zip(self._rows, parts, sources, counts, strict=True):
            rows.index, rows.source, rows.kept = index, source, count

    def _places_on(self, device: torch.device) -> Tensor:
        self._places = self._places.to(device)
        return self._places

    def close(self) -> None:
        """The linears compute as before."""
        for target in self._targets:
            vars(target.observed).pop("forward", None)


class _Rows:
    """index: int64 [kept rows], ascending, on a GPU `aligned`; None: every row. source: int64
    [rows], which of the kept rows a row is, and `kept` where it is none. Read when the backward
    runs, which may be after several forwards."""

    index: Tensor | None = None
    source: Tensor
    kept = 0


def _forward(module: nn.Module, rows: _Rows, output_dim: int) -> Any:
    linear: Any = module

    def forward(x: Tensor) -> Tensor:
        weight, bias = linear.weight, linear.bias
        if dtype := autocast_dtype(x):
            x, weight = x.to(dtype), weight.to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        return _RowSparse.apply(x, weight, bias, rows, output_dim)

    return forward


class _RowSparse(torch.autograd.Function):
    """x W^T + b for W [out, in], or x W + b for a Conv1D's W [in, out] (`output_dim` 1)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, output_dim: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.output_dim = rows, output_dim
        return F.linear(x, weight if output_dim == 0 else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])  # [tokens, out]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (outer @ (weight if ctx.output_dim == 0 else weight.t())).view(x.shape)
        if ctx.needs_input_grad[1]:
            inner = x.reshape(-1, x.shape[-1])  # [tokens, in]
            of_weight = _weight_gradient(outer, inner, weight, ctx.rows, ctx.output_dim)
        if ctx.needs_input_grad[2]:
            of_bias = outer.sum(0)
        return of_x, of_weight, of_bias, None, None


def _weight_gradient(
    outer: Tensor, inner: Tensor, weight: Tensor, rows: _Rows, output_dim: int
) -> Tensor:
    if rows.index is None:
        return outer.t() @ inner if output_dim == 0 else inner.t() @ outer
    kept = outer.index_select(1, rows.index)  # [tokens, kept]
    if output_dim == 1:
        product = (inner.t() @ kept)[:, : rows.kept]
        return torch.zeros_like(weight).index_copy_(1, rows.index[: rows.kept], product)
    # A row of zeros behind the kept ones is every other row's: one pass over the gradient.
    product = outer.new_empty(kept.shape[1] + 1, inner.shape[1])
    torch.mm(kept.t(), inner, out=product[:-1])
    product[rows.kept].zero_()
    return product.index_select(0, rows.source)


def require_plain_linears(model: nn.Module, targets: list[Target]) -> None:
    """Raises UserError where a target is an adapter, quantized, or shares its weight with another
    module; or its module computes in a way of its own."""
    for target in targets:
        module = target.observed
        if is_adapted(module) or ".lora_" in target.name:
            raise UserError(
                "mask.backward: row_sparse gains nothing with LoRA, whose gradients are small; set "
                "mask.backward=dense"
            )
        if not target.weight.is_floating_point():
            raise UserError(f"mask.backward: {target.name} is quantized; {ADVICE}")
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward) or "forward" in vars(
            module
        ):
            raise UserError(
                f"mask.backward: {target.name} belongs to a {type(module).__name__}, which "
                f"computes in a way of its own; {ADVICE}"
            )
    weights = {id(t.weight): t for t in targets}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if id(p) in weights and module is not weights[id(p)].observed:
                raise UserError(
                    f"mask.backward: {weights[id(p)].name} is tied to a weight of {name}, which "
                    f"has other rows; {ADVICE}"
                )
