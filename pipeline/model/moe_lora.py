"""A LoRA adapter as a mixture of experts, between which a router decides for every token (MoELoRA,
Luo et al. 2024, arXiv 2402.12851; here all experts count, by a softmax).

The adapter's ranks are cut into `experts` parts. A layer's router is a linear of its input, whose
softmax, times the number of experts, multiplies what each part's A gives; it starts at zero, so
that the layer begins as plain LoRA. PEFT has no such adapter: what is published names a kind that
PEFT refuses, and is read here.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.model.lora import ADAPTER, WEIGHTS, add_adapter, base_of, recorded
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
    named = {n: w.to("cpu", dtype).contiguous() for n, w in weights}
    settings = net.peft_config["default"]
    experts = next(len(w) for n, w in named.items() if n.endswith(".router.weight"))
    content = {
        "peft_type": KIND,
        "base_model_name_or_path": settings.base_model_name_or_path,
        "revision": settings.revision,
        "experts": experts,
        "r": settings.r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "targets": sorted(settings.target_modules),
    }
    (folder / ADAPTER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


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
    try:
        found = load_file(Path(adapter) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{Path(adapter) / WEIGHTS}: cannot be read ({error})") from None
    own = {n: p for n, p in net.named_parameters() if p.requires_grad}
    if own.keys() != found.keys() or any(own[n].shape != w.shape for n, w in found.items()):
        raise UserError(f"{adapter}: its weights are not those of an adapter of {base}")
    for name, weight in found.items():
        own[name].data = weight.to(own[name].device, dtype or own[name].dtype)
