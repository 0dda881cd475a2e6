"""A LoRA adapter as a mixture of experts, between which a router decides for every token (MoELoRA,
Luo et al. 2024, arXiv 2402.12851; here all experts count, by a softmax).

The adapter's ranks are cut into `experts` parts. A layer's router is a linear of its input, whose
softmax, times the number of experts, multiplies what each part's A gives; it starts at zero, so
that the layer begins as plain LoRA. PEFT has no such adapter: what is published names a kind that
PEFT refuses, and is read here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.lora import (
    add_adapter,
    base_of,
    fill_adapter,
    read_adapter,
    recorded,
    write_adapter,
)
from pipeline.recipe import Lora

KIND = "MIGU_MIXTURE"  # where PEFT has its own names


def add_moe_lora(
    net: Any, lora: Lora, base: str | None, revision: str | None, task_type: str | None, seed: int
) -> None:
    """As `add_adapter`, with a router for each adapted layer."""
    add_adapter(net, lora, base, revision, task_type, seed)
    for module in list(net.modules()):
        if hasattr(module, "lora_A"):
            _route(module.lora_A["default"], lora.experts)


def _route(a: nn.Linear, experts: int) -> None:
    w = a.weight
    router = nn.Linear(a.in_features, experts, bias=False, device=w.device, dtype=w.dtype)
    nn.init.zeros_(router.weight)
    a.router = router
    each = a.out_features // experts

    def gate(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shares = router(inputs[0]).float().softmax(-1) * experts
        return output * shares.repeat_interleave(each, dim=-1).to(output.dtype)

    a.register_forward_hook(gate)


def is_moe_lora(adapter: str | Path) -> bool:
    """Whether an adapter's folder (`lora.is_adapter`) holds one."""
    return recorded(adapter).get("peft_type") == KIND


def has_routers(net: Any) -> bool:
    return any(hasattr(m, "router") for n, m in net.named_modules() if n.endswith("lora_A.default"))


def save_moe_lora(
    net: Any, weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype
) -> None:
    """weights: of the adapter and its routers, by the names of the model's parameters."""
    named = dict(weights)
    experts = next(len(w) for n, w in named.items() if n.endswith(".router.weight"))
    content = {"peft_type": KIND, "experts": experts}
    write_adapter(folder, net.peft_config["default"], content, named.items(), dtype)


def load_moe_lora(
    net: Any, adapter: str | Path, task_type: str | None, dtype: torch.dtype | None = None
) -> None:
    """Give the base what was published, to be trained on. dtype: as of `load_adapter`.

    Raises:
        UserError: its base is gone; the file is damaged, or of another model.
    """
    base, revision = base_of(adapter)
    settings = recorded(adapter)
    lora = Lora(**{k: settings[k] for k in ("experts", "r", "alpha", "dropout", "targets")})
    add_moe_lora(net, lora, base, revision, task_type, 0)
    fill_adapter(net, read_adapter(adapter), adapter, dtype)
