"""How much each unit of a model matters: attention heads, neurons and outputs of the FFN.

A unit's importance is the gradient of a loss with respect to a gate of one on it (Michel et al.
2019; Ke et al. 2023): large where the loss would feel it go.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.migu.targets import component_of
from pipeline.model.blocks import block_linears
from pipeline.ranks import world_size

BLOCK = re.compile(r"(.*?\.\d+)\.")
Importance = dict[str, Tensor]  # by gate: fp32 [its features]


@dataclass(frozen=True)
class Gate:
    """Units at the input or output of a linear. kind: heads, neurons, outputs; size: features."""

    key: str  # block and kind
    module: nn.Module
    kind: str
    size: int


def gates_of(net: Any) -> list[Gate]:
    """The gates of every block.

    Raises:
        UserError: attention whose Q, K and V are one linear, or an encoder-decoder.
    """
    config = net.config.get_text_config()
    found = []
    for name, linear in block_linears(net):
        component = component_of(name)
        if component == "qkv" or config.is_encoder_decoder:
            raise UserError(
                f"das: {config.model_type} is not supported: its attention heads are not rows of a "
                "query, a key and a value of their own"
            )
        block = BLOCK.match(name)
        assert block is not None
        weight: Any = linear.weight
        rows, columns = weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape
        if component == "o":
            found.append(Gate(f"{block[1]}:heads", linear, "heads", columns))
        elif component == "ffn_out":
            found.append(Gate(f"{block[1]}:neurons", linear, "neurons", columns))
            found.append(Gate(f"{block[1]}:outputs", linear, "outputs", rows))
    return found


@contextmanager
def gated(gates: list[Gate], factors: dict[str, Tensor]) -> Iterator[None]:
    """Multiply every gate's features by its factor [features] within the context."""

    def at_input(factor: Tensor) -> Callable:
        return lambda _module, inputs: (inputs[0] * factor.to(inputs[0]), *inputs[1:])

    def at_output(factor: Tensor) -> Callable:
        return lambda _module, _inputs, output: output * factor.to(output)

    handles: list[Any] = []
    for gate in gates:
        factor = factors[gate.key]
        if gate.kind == "outputs":
            handles.append(gate.module.register_forward_hook(at_output(factor)))
        else:
            handles.append(gate.module.register_forward_pre_hook(at_input(factor)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_importance(net: Any, losses: Iterable[Callable[[], Tensor]]) -> Importance:
    """Of a whole model. losses: of this rank's share of the text, sums over tokens; together the
    ranks' shares are the text, and every rank gets the same.

    Standardised over the units of a kind within a block, then |tanh|: 0 to 1.
    """
    gates = gates_of(net)
    device = next(net.parameters()).device
    ones = {g.key: torch.ones(g.size, device=device, requires_grad=True) for g in gates}
    sums = torch.zeros(sum(g.size for g in gates), device=device, dtype=torch.float64)
    with gated(gates, ones):
        for loss in losses:
            found = torch.autograd.grad(loss(), [ones[g.key] for g in gates])
            sums += torch.cat(found).double()
    if world_size() > 1:
        dist.all_reduce(sums)
    pieces = sums.cpu().split([g.size for g in gates])
    heads = net.config.get_text_config().num_attention_heads
    return {g.key: _normalized(p, g, heads) for g, p in zip(gates, pieces, strict=True)}


def accumulated(found: list[Importance]) -> Importance:
    """What mattered to any of them: the maximum."""
    return {key: torch.stack([f[key] for f in found]).amax(0) for key in found[0]}


def soft_masks(net: Any, importance: Importance) -> dict[str, tuple[Tensor, int]]:
    """By parameter: (1 - importance, [rows] or [columns]; the dimension that it is along).

    Heads: the rows of Q, K and V (of keys and values that heads share, by the most important of
    them), the columns of O. Neurons: the rows of the FFN's first linears. Outputs: the rows of its
    last one. Biases go with their rows.
    """
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in net.named_parameters()}
    config = net.config.get_text_config()
    masks: dict[str, tuple[Tensor, int]] = {}
    for name, _ in block_linears(net):
        block, component = BLOCK.match(name), component_of(name)
        assert block is not None
        rows = shapes[f"{name}.weight"][0]
        if component == "o":
            masks[f"{name}.weight"] = (1 - importance[f"{block[1]}:heads"], 1)
            continue
        kinds = {"q": "heads", "k": "heads", "v": "heads", "ffn_in": "neurons"}
        kinds |= {"ffn_gate": "neurons", "ffn_out": "outputs"}
        keep = 1 - importance[f"{block[1]}:{kinds[component]}"]
        if len(keep) != rows:  # grouped-query attention
            size = len(keep) // config.num_attention_heads
            keep = keep.view(rows // size, -1, size).amin(1).reshape(-1)
        for parameter in (f"{name}.weight", f"{name}.bias"):
            if parameter in shapes:
                masks[parameter] = (keep, 0)
    return masks


def _normalized(sums: Tensor, gate: Gate, heads: int) -> Tensor:
    if gate.kind == "heads":
        sums = sums.view(heads, -1).sum(1)
    found = ((sums - sums.mean()) / sums.std().clamp_min(1e-30)).tanh().abs().float()
    return found.repeat_interleave(gate.size // heads) if gate.kind == "heads" else found
