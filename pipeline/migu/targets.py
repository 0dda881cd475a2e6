"""Which linear layers are masked (paper, section 3.3: Q, K, V, O and the FFN of every block)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.migu.mask import kept_count

# Component -> the names that transformers gives to such a linear, most specific first.
# A name with a dot is compared with the end of the module's path.
COMPONENTS = {
    "qkv": ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "in_proj"),
    "q": ("query", "q_proj", "q_lin", "query_proj", "q"),
    "k": ("key", "k_proj", "k_lin", "key_proj", "k"),
    "v": ("value", "v_proj", "v_lin", "value_proj", "v"),
    "o": (
        "attention.output.dense",
        "attention.dense",
        "attn.c_proj",
        "self_attention.dense",
        "o_proj",
        "out_proj",
        "out_lin",
        "attn.Wo",
        "o",
    ),
    "ffn_in": (
        "intermediate.dense",
        "up_proj",
        "gate_up_proj",
        "fc1",
        "lin1",
        "c_fc",
        "fc_in",
        "dense_h_to_4h",
        "wi",
        "wi_1",
        "mlp.Wi",
        "ffn",
    ),
    "ffn_gate": ("gate_proj", "wi_0"),
    "ffn_out": (
        "output.dense",
        "down_proj",
        "fc2",
        "lin2",
        "c_proj",
        "fc_out",
        "dense_4h_to_h",
        "wo",
        "mlp.Wo",
        "ffn_output",
    ),
}
GROUPS = {"attention": ("q", "k", "v", "qkv", "o"), "ffn": ("ffn_in", "ffn_gate", "ffn_out")}


@dataclass(frozen=True)
class Target:
    """One masked weight.

    name: the parameter's name in the model; observed: the module whose output gives the
    magnitudes; rows: its output features; output_dim: the dimension of the weight that indexes
    them (0 for nn.Linear's [out, in], 1 for GPT-2's Conv1D [in, out]).
    """

    name: str
    weight: Tensor
    observed: nn.Module
    component: str
    rows: int
    output_dim: int = 0


def find_targets(model: nn.Module, components: list[str] | None = None) -> list[Target]:
    """The weights that MIGU masks in `model`, in the order of its modules.

    components: a subset of COMPONENTS, GROUPS and "head" (an untied output head, which the
    authors' code masks too). Default: everything in the blocks.

    Raises:
        UserError: nothing to mask, an unknown component, a model that masking would not cover.
    """
    wanted = _wanted(components)
    blocks = tuple(f"{name}." for name in _blocks(model))
    found: list[Target] = []
    for name, module in model.named_modules():
        if name.startswith(blocks) and _is_router(name, module):
            continue
        if name.startswith(blocks) and isinstance(module, (nn.Linear, Conv1D)):
            component = component_of(name)
            if wanted is None or component in wanted:
                rows, dim = (
                    (module.nf, 1) if isinstance(module, Conv1D) else (module.out_features, 0)
                )
                found.append(Target(f"{name}.weight", module.weight, module, component, rows, dim))
        elif name.startswith(blocks) and any(p.dim() == 3 for p in module.parameters(False)):
            raise UserError(
                f"{name}: the experts of this model are one 3-D parameter, whose outputs MIGU "
                "cannot record. Set mask.enabled=false."
            )
    if wanted and "head" in wanted:
        found.append(_head(model))
    found = [t for t in found if t.weight.requires_grad]
    if not found:
        kind = type(model).__name__
        what = f"{components} name no linear layer" if components else "no linear layer in a block"
        raise UserError(
            f"mask: nothing to mask in {kind}: {what}. Set mask.enabled=false, or choose "
            f"mask.components among {', '.join([*COMPONENTS, *GROUPS, 'head'])}."
        )
    return found


def component_of(name: str) -> str:
    """The component that a module's path stands for; "other" where no known name fits."""
    path = f".{name}"
    matches = [
        (len(known), component)
        for component, names in COMPONENTS.items()
        for known in names
        if path.endswith(f".{known}")
    ]
    return max(matches)[1] if matches else "other"


def _wanted(components: list[str] | None) -> set[str] | None:
    if components is None:
        return None
    wanted: set[str] = set()
    for component in components:
        if component not in COMPONENTS and component not in GROUPS and component != "head":
            raise UserError(
                f"mask.components: unknown component {component!r}; "
                f"known: {', '.join([*COMPONENTS, *GROUPS, 'head'])}"
            )
        wanted.update(GROUPS.get(component, (component,)))
    return wanted


def _blocks(model: nn.Module) -> list[str]:
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


def _is_router(name: str, module: nn.Module) -> bool:
    last = name.rsplit(".", 1)[-1]
    one_output = isinstance(module, nn.Linear) and module.out_features == 1
    return one_output or last in ("gate", "router", "shared_expert_gate")


def _head(model: nn.Module) -> Target:
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if not isinstance(head, nn.Linear):
        raise UserError("mask.components: this model has no linear output head to mask")
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        raise UserError(
            "mask.components: the output head shares its weight with the embeddings; masking it "
            "would mask embedding rows too. Remove 'head'."
        )
    name = next(n for n, m in model.named_modules() if m is head)
    return Target(f"{name}.weight", head.weight, head, "head", head.out_features)


def count_rows(targets: list[Target], threshold: float, rule: Literal["exact", "quantile"]) -> dict:
    """Per component: {"linears", "rows", "kept"}: how many, in all, and kept each step."""
    found: dict[str, dict[str, int]] = {}
    for target in targets:
        counts = found.setdefault(target.component, {"linears": 0, "rows": 0, "kept": 0})
        counts["linears"] += 1
        counts["rows"] += target.rows
        counts["kept"] += kept_count(target.rows, threshold, rule)
    return found
