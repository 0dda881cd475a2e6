"""Mixtures of experts whose experts are one 3-D parameter a matrix, as transformers keep them.

No module of theirs has the outputs of one expert's linear. So while somebody looks at them, the
experts compute here: the same sums as the library's, token by token in the order of their experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.model.split_linear import autocast_dtype

See = Callable[[str, Tensor, Tensor, Tensor, int], None]
"""A weight's name; its outputs [pairs, rows], one for each pair of a token and an expert that it
was sent to, ordered by expert; int64 [experts], how many pairs each has; int64 [pairs], the token
of each; how many tokens there are."""


def expert_weights(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the weights of a module that `observe` takes: [experts, out, in], or, where its
    `is_transposed` says so, [experts, in, out].

    Raises:
        UserError: its experts compute in another way than the library's.
    """
    if not can_observe(module):
        raise UserError(
            f"{path}: the experts of this model are one 3-D parameter and compute in a way of "
            "their own, so that MIGU does not see their outputs. Leave them out with "
            "mask.components, or set mask.enabled=false."
        )
    return {name: module.get_parameter(name) for name in _names(module)}


def can_observe(module: nn.Module) -> bool:
    """Whether the experts of a module compute as the library's do, so that they can do it here."""
    known = hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")
    return known and set(_names(module)) <= set(module._parameters)


def _names(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def observe(module: nn.Module, see: See) -> None:
    """From now on `see` is called with the outputs of every forward; ends with `look_away`."""
    module.forward = _forward(module, see)  # type: ignore[assignment]


def look_away(module: nn.Module) -> None:
    vars(module).pop("forward", None)


def _forward(module: nn.Module, see: See) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    m: Any = module

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        order = top_k_index.reshape(-1).argsort(stable=True)  # [pairs], ordered by expert
        token, expert = order // top_k_index.shape[1], top_k_index.reshape(-1)[order]
        numbers = torch.arange(len(m.down_proj), device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))

        def linear(name: str, x: Tensor) -> Tensor:
            weight = getattr(m, name)
            dtype = autocast_dtype(x) or weight.dtype
            x, weight = x.to(dtype), weight.to(dtype)
            y = _products(x, weight if m.is_transposed else weight.mT, ends.int())
            if m.has_bias:
                y = y + getattr(m, f"{name}_bias")[expert]
            see(name, y, counts, token, len(hidden_states))
            return y

        up, down = _names(module)
        x = linear(up, hidden_states[token])
        x = linear(down, m._apply_gate(x) if m.has_gate else m.act_fn(x))
        if getattr(m, "has_post_expert_norm", False):  # transformers 5.17 has no such thing yet
            x = m.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order, None]
        by_token = torch.empty_like(x).index_copy(0, order, x).view(*top_k_index.shape, -1)
        return by_token.sum(1).to(hidden_states.dtype)

    return forward


def _products(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """[pairs, out]: rows of x [pairs, in], ordered by expert, times their expert's matrix of
    weights [experts, in, out]; ends: int32 [experts], where the rows of each end."""
    aligned = all(n * x.element_size() % 16 == 0 for n in weights.shape[1:])
    ampere = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    traced = (torch.compiler.is_compiling() or x.is_meta) and x.dtype != torch.bfloat16
    if aligned and ampere and not traced:
        return F.grouped_mm(x, weights, offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(x, weights, ends)  # one after the other
