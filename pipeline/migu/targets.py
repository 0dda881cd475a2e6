"""Which linear layers are masked (paper, section 3.3: Q, K, V, O and the FFN of every block)."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import UserError
from pipeline.migu.mask import kept_count
from pipeline.model.blocks import has_experts, is_adapted, linears_and_experts
from pipeline.model.split_linear import SplitLinear
from pipeline.model.stacked_experts import can_observe, expert_weights

# Component -> the names that transformers gives to such a linear, most specific first.
# A name with a dot is compared with the end of the module's path.
COMPONENTS = {
    "qkv": ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "in_proj"),
    "q": ("query", "q_proj", "q_lin", "query_proj", "pos_query_proj", "q_attn", "q"),
    "k": ("key", "k_proj", "k_lin", "key_proj", "pos_key_proj", "k"),
    "v": ("value", "v_proj", "v_lin", "value_proj", "v"),
    "o": (
        "attention.output.dense",
        "crossattention.output.dense",
        "attention.dense",
        "attn.c_proj",
        "crossattention.c_proj",
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
    them (0 for nn.Linear's [out, in], 1 for GPT-2's Conv1D [in, out]); parts: the sizes of the
    consecutive pieces of the rows in which rows are selected separately, by default one of all;
    experts: how many, of a mixture in one weight, a matrix of each behind the other, whose rows
    follow each other likewise; 0: it is a matrix; tokens: what the outputs are of: the model's
    input, the decoder's input (of an encoder-decoder), or something that is no token.
    """

    name: str
    weight: Tensor
    observed: nn.Module
    component: str
    rows: int
    output_dim: int = 0
    parts: tuple[int, ...] = ()
    experts: int = 0
    tokens: Literal["input", "decoder", "none"] = "input"

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (self.rows,))

    @property
    def layers(self) -> int:
        """How many linears it stands for: one, or one for each expert."""
        return self.experts or 1

    @property
    def input_dim(self) -> int:
        """The dimension of the weight that indexes the input features, from the end."""
        return -2 if self.output_dim else -1


def find_targets(
    model: nn.Module,
    components: list[str] | None = None,
    split_fused: bool = False,
    partly: bool = False,
) -> list[Target]:
    """The weights that MIGU masks in `model`, in the order of its modules.

    Of a LoRA layer (PEFT) these are A, masked by its own output x_A, and B, masked by the output
    x_O of the whole layer (paper, Eq. 7-9), of every active adapter; their component is that of the
    layer they adapt. The frozen weights are none.

    components: a subset of COMPONENTS, GROUPS and "head" (an untied output head, which the
    authors' code masks too). Default: everything in the blocks.
    partly: leave out experts whose outputs cannot be recorded, rather than refuse them: to
        measure, not to mask.
    split_fused: give the linears that hold several in one weight (q, k, v; gate, up) their parts.

    Raises:
        UserError: nothing to mask, an unknown component, a model that masking would not cover;
            with `split_fused`, no fused linear, or one whose layout is not known.
    """
    wanted = _wanted(components)
    _check_adapters(model)
    found: list[Target] = []
    for name, module in linears_and_experts(model):
        if has_experts(module):
            found += _experts_in(name, module, wanted, partly)
            continue
        component = component_of(name)
        if wanted is None or component in wanted:
            found += _targets_of(name, module, component)
    if wanted and "head" in wanted:
        found.append(_head(model))
    found = [replace(t, tokens=_tokens(t, model)) for t in found if t.weight.requires_grad]
    if not found:
        kind = type(model).__name__
        what = (
            f"{components} name no trained linear layer"
            if components
            else "no trained linear layer in a block"
        )
        raise UserError(
            f"mask: nothing to mask in {kind}: {what}. Set mask.enabled=false, or choose "
            f"mask.components among {', '.join([*COMPONENTS, *GROUPS, 'head'])}."
        )
    _check_ties(model, found)
    return _split(model, found) if split_fused else found


def _check_ties(model: nn.Module, targets: list[Target]) -> None:
    """Raises UserError for a target whose weight is another layer's too, and named after that."""
    names = {id(p): name for name, p in model.named_parameters()}
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for target in targets:
        known = names.get(id(target.weight), target.name)
        if known != target.name and owners[id(target.weight)] > 1:
            raise UserError(
                f"mask: {target.name} and {known} are one weight, whose rows have outputs in two "
                "layers; leave them out with mask.components, or set mask.enabled=false"
            )


def _split(model: nn.Module, targets: list[Target]) -> list[Target]:
    """The targets, the fused ones with their parts. The A of a fused LoRA layer is not fused: its
    rows are those of the rank."""
    config = _config(model)
    split = [t if ".lora_A." in t.name else replace(t, parts=_parts(t, config)) for t in targets]
    if split == targets:
        raise UserError(
            f"mask.split_fused: has no effect, no masked linear of {type(model).__name__} is "
            "fused; remove it"
        )
    return split


def _config(model: nn.Module) -> Any:
    """The configuration of the model inside whatever wraps it; None where it has none."""
    return next((m.config for m in model.modules() if hasattr(m, "config")), None)


CROSSES = {"EncDecAttention", "encoder_attn", "crossattention"}  # from the decoder to the encoder


def _tokens(target: Target, model: nn.Module) -> Literal["input", "decoder", "none"]:
    path = target.name.split(".")
    if {"pos_query_proj", "pos_key_proj"} & set(path):
        return "none"  # DeBERTa: relative positions
    if not getattr(_config(model), "is_encoder_decoder", False):
        return "input"
    if "decoder" not in path and target.component != "head":
        return "input"
    return "input" if CROSSES & set(path) and target.component in ("k", "v", "qkv") else "decoder"


def _parts(target: Target, config: Any) -> tuple[int, ...]:
    """The sizes of the parts of a linear, one after the other; (rows,) where it is not fused.

    Whether and how a linear is fused is the model's own affair: its forward cuts up the output.
    Hence the table of the models whose parts are known to be contiguous.
    """
    path = target.name.removesuffix(".weight").split(".lora_B.")[0]
    name, rows = path.rsplit(".", 1)[-1], target.rows
    if target.experts:
        halves = name == "gate_up_proj" and target.observed.is_concatenated
        each = rows // target.layers
        return ((each // 2,) * 2 if halves else (each,)) * target.layers
    if target.component not in ("qkv", "other") and name not in ("gate_up_proj", "Wi"):
        return (rows,)
    kind = getattr(config, "model_type", type(config).__name__)
    parts: tuple[int, ...] = ()
    if (kind, name) == ("gpt2", "c_attn"):  # in cross-attention it is k and v
        parts = (config.n_embd,) * (rows // config.n_embd)
    elif (kind, name) == ("modernbert", "Wqkv"):
        parts = (rows // 3,) * 3
    elif (kind, name) in (("modernbert", "Wi"), ("phi3", "gate_up_proj")):
        parts = (rows // 2,) * 2
    elif (kind, name) == ("phi3", "qkv_proj"):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        parts = (heads * size, kv_heads * size, kv_heads * size)
    if sum(parts) != rows:
        raise UserError(
            f"mask.split_fused: {path}: it is not known that the parts of this layer of a "
            f"{kind!r} model are contiguous (in some models they alternate by head). Remove "
            "split_fused, or leave the layer out with mask.components."
        )
    return parts


def _targets_of(name: str, module: nn.Module, component: str) -> list[Target]:
    if isinstance(module, Conv1D):
        return [Target(f"{name}.weight", module.weight, module, component, module.nf, 1)]
    if isinstance(module, SplitLinear):  # to be measured; its masked rows are frozen
        rows = module.out_features
        return [Target(f"{name}.weight", module.kept, module, component, rows)]
    if isinstance(module, nn.Linear):
        rows = module.out_features
        return [Target(f"{name}.weight", module.weight, module, component, rows)]
    layer: Any = module  # a LoRA layer; A and B are nn.Linear, also on a Conv1D
    targets = []
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter], layer.lora_B[adapter]
            a_name, b_name = (f"{name}.lora_{x}.{adapter}.weight" for x in "AB")
            targets.append(Target(a_name, a.weight, a, component, a.out_features))
            targets.append(Target(b_name, b.weight, layer, component, b.out_features))
    return targets


def _experts_in(
    path: str, module: nn.Module, wanted: set[str] | None, partly: bool
) -> list[Target]:
    """Those of the wanted components that are trained; an expert's rows are selected by
    themselves, as if each had linears of its own."""
    trained = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
    if not any(wanted is None or component_of(n) in wanted for n in trained):
        return []
    if partly and not can_observe(module):
        return []
    found = []
    for name, weight in expert_weights(path, module).items():
        component, output_dim = component_of(name), int(module.is_transposed)  # type: ignore[arg-type]
        experts, *sizes = getattr(weight, "ds_shape", weight.shape)
        rows = sizes[output_dim]
        if wanted is None or component in wanted:
            found.append(
                Target(
                    f"{path}.{name}", weight, module, component, rows * experts, output_dim,
                    parts=(rows,) * experts, experts=experts,
                )
            )  # fmt: skip
    return found


def _check_adapters(model: nn.Module) -> None:
    """Raises UserError where adapter weights train whose outputs the hooks would not see."""
    advice = "Use plain LoRA, or set mask.enabled=false."
    configs: Any = getattr(model, "peft_config", {})
    for config in configs.values():
        if config.peft_type != "LORA":
            raise UserError(f"mask: PEFT's {config.peft_type.value} cannot be masked. {advice}")
        if config.target_parameters:
            raise UserError(
                "mask: PEFT's target_parameters adapts weights without a layer of their own, whose "
                f"outputs cannot be recorded. {advice}"
            )
    for name, module in model.named_modules():
        if not is_adapted(module):
            continue
        layer: Any = module
        kind = type(layer).__name__
        if not hasattr(layer, "lora_A") or kind == "ParamWrapper":
            raise UserError(f"{name}: PEFT's {kind} cannot be masked. {advice}")
        if kind not in ("Linear", "Linear4bit", "Linear8bitLt"):
            raise UserError(f"{name}: LoRA on {kind} cannot be masked, only on linears. {advice}")
        if layer.lora_variant:
            kinds = {type(v).__name__.removesuffix("Variant") for v in layer.lora_variant.values()}
            variant = ", ".join(sorted(kinds)).replace("DoraLinear", "DoRA")
            raise UserError(f"{name}: {variant} cannot be masked. {advice}")
        if layer.merged or layer.disable_adapters:
            state = "merged" if layer.merged else "disabled"
            fix = "unmerge" if layer.merged else "enable"
            raise UserError(
                f"{name}: its adapter is {state}, so that A has no output to record; {fix} it first"
            )


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
    if not head.weight.requires_grad:
        raise UserError("mask.components: LoRA does not train the output head; remove 'head'")
    name = next(n for n, m in model.named_modules() if m is head)
    return Target(f"{name}.weight", head.weight, head, "head", head.out_features)


def count_rows(targets: list[Target], threshold: float, rule: Literal["exact", "quantile"]) -> dict:
    """Per component: {"linears", "rows", "kept"}: how many, in all, and kept each step."""
    found: dict[str, dict[str, int]] = {}
    for target in targets:
        counts = found.setdefault(target.component, {"linears": 0, "rows": 0, "kept": 0})
        counts["linears"] += target.layers
        counts["rows"] += target.rows
        counts["kept"] += sum(kept_count(part, threshold, rule) for part in target.parts)
    return found
