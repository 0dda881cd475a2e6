"""The transformer blocks of a model and the linear layers in them."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.model.split_linear import SplitLinear


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks: what transformers checkpoints, else the module lists."""
    names = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    if names:
        return names
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(name)
    return [f"{n}.{i}" for n in lists for i in range(len(model.get_submodule(n)))]  # type: ignore[arg-type]


def weights_in(dtype: torch.dtype, part: nn.Module) -> nn.Module:
    """Convert the weights in place, of those that ZeRO-3 has not sharded yet. Not the buffers:
    rotary frequencies, in half precision, would be those of another model."""
    for p in part.parameters():
        if p.is_floating_point() and not hasattr(p, "ds_id"):
            p.data = p.data.to(dtype)
    return part


def block_linears(model: nn.Module, experts: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the linears in the blocks, without routers; LoRA layers are one module.

    Raises:
        UserError: the experts of a block are a 3-D parameter; not with `experts`, which leaves
            them out.
    """
    for name, module in linears_and_experts(model):
        if not has_experts(module):
            yield name, module
        elif not experts:
            raise UserError(
                f"{name}: the experts of this model are one 3-D parameter, no linear layers, which "
                "LoRA, das, hft and ssu need. For LoRA on the other layers set model.lora.targets."
            )


def linears_and_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the linears in the blocks and of modules whose weights are the experts of
    a mixture, one 3-D parameter a matrix; without routers. LoRA layers are one module."""
    blocks = tuple(f"{name}." for name in find_blocks(model))
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(blocks) or name.startswith(adapted):
            continue
        if is_adapted(module):
            adapted += (f"{name}.",)  # what is inside belongs to it
        if _is_router(name, module):
            continue
        linear = is_adapted(module) or isinstance(module, (nn.Linear, Conv1D, SplitLinear))
        if linear or has_experts(module):
            yield name, module


def has_experts(module: nn.Module) -> bool:
    """Whether its own weights are those of several experts; Mamba's convolution is 3-D too."""
    three = any(_dimensions(p) == 3 for p in module.parameters(False))
    return three and not isinstance(module, nn.Conv1d)


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has wrapped this layer. It is not imported here: it takes a second."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)


def _dimensions(p: Any) -> int:
    return len(getattr(p, "ds_shape", p.shape))  # ZeRO-3 keeps a parameter's shape there


def _is_router(name: str, module: nn.Module) -> bool:
    last = name.rsplit(".", 1)[-1]
    one_output = isinstance(module, nn.Linear) and module.out_features == 1
    return one_output or last in ("gate", "router", "shared_expert_gate")
