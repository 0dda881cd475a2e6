"""AdamW's moments as fp32 tensors, whoever keeps them: torch, DeepSpeed's on the CPU, bitsandbytes.

bitsandbytes packs those of large tensors into 8 bits, by blocks. They are unpacked and packed again
here, which rounds them once more: a run that goes on from a checkpoint with 8-bit moments is not
bit for bit the uninterrupted one.
"""

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from pipeline.shard import MOMENTS

PACKED = {"exp_avg": "1", "exp_avg_sq": "2"}  # bitsandbytes' numbers of them
BLOCK = 256  # its elements with one scale


def make_state(adam: Any, weight: Tensor) -> dict[str, Any]:
    """What the optimizer knows of a tensor that it steps on; made (zero) before the first step."""
    state = adam.state[weight]
    if state:
        return state
    if hasattr(adam, "init_state"):  # bitsandbytes
        group = adam.param_groups[0]
        own, group["params"] = group["params"], [weight]  # it looks there; ZeRO-3's are elsewhere
        adam.init_state(group, weight, 0, 0)
        group["params"] = own
        return adam.state[weight]
    on_host = isinstance(adam, DeepSpeedCPUAdam)
    state["step"] = 0 if on_host else torch.zeros((), device=weight.device)
    for moment in MOMENTS:
        state[moment] = torch.zeros_like(weight, dtype=torch.float32)
    return state


def moments_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The moments, flat, fp32: live, or unpacked copies, which `pack` writes back."""
    if "exp_avg" in state:
        return {m: state[m].view(-1) for m in MOMENTS}
    if not is_packed(state):
        return {m: state[f"state{n}"].view(-1) for m, n in PACKED.items()}
    from bitsandbytes.functional import dequantize_blockwise

    return {
        m: dequantize_blockwise(
            state[f"state{n}"].view(-1),
            absmax=state[f"absmax{n}"],
            code=state[f"qmap{n}"],
            blocksize=BLOCK,
        )
        for m, n in PACKED.items()
    }


def is_packed(state: dict[str, Any]) -> bool:
    return "absmax1" in state


def pack(state: dict[str, Any], moments: dict[str, Tensor]) -> None:
    """Write what `moments_of` unpacked back into the optimizer's 8 bits."""
    from bitsandbytes.functional import quantize_blockwise

    for m, n in PACKED.items():
        packed, scales = quantize_blockwise(moments[m], code=state[f"qmap{n}"], blocksize=BLOCK)
        state[f"state{n}"].view(-1).copy_(packed.view(-1))
        state[f"absmax{n}"].copy_(scales.absmax)
