"""Mixtures whose experts are one parameter a matrix: each expert's rows are masked by its own
outputs, on every engine."""

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask
from pipeline.migu.mask import kept_count
from pipeline.migu.targets import count_rows, find_targets
from pipeline.model.lora import adapted_linears
from pipeline.ranks import world_size
from pipeline.recipe import Lora, Mask
from pipeline.run.memory import activations
from pipeline.run.row_groups import weight_rows
from pipeline.run.speed import training_flops
from pipeline.run.stage_rows import masked_targets
from pipeline.shard import ParameterShards
from tests.reference import (
    BETAS,
    CLIP,
    EPS,
    LR,
    THRESHOLD,
    WEIGHT_DECAY,
    micro_batches,
    step_loss,
)
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, recipe_for, train_shares, zero_engine

EXPERTS = 5
SIZES = {
    "vocab_size": 53,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WEIGHTS = ("gate_up_proj", "down_proj")


def tiny(kind):
    """mixtral: [experts, out, in]; gpt_oss: [experts, in, out], with biases."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).train()


def modules_of_experts(model):
    return {n: m for n, m in model.named_modules() if n.endswith("mlp.experts")}


def outputs_of_experts(module, hidden, index):
    """By weight, of every expert the outputs [tokens, rows] that it gives, by hand."""
    found = {name: [] for name in WEIGHTS}
    for e in range(EXPERTS):
        x = hidden[(index == e).any(1)]
        for name in WEIGHTS:
            weight = getattr(module, name)[e]
            x = x @ (weight if module.is_transposed else weight.T)
            if module.has_bias:
                x = x + getattr(module, f"{name}_bias")[e]
            found[name].append(x)
            x = module._apply_gate(x) if name == "gate_up_proj" else x
    return found


def train_reference(kind, steps, strict):
    """(weights, per step the kept rows of each masked weight), in one process."""
    model = tiny(kind)
    magnitude = {}

    def add(name, n):
        magnitude[name] = magnitude.get(name, 0) + n

    def of_linear(name):
        return lambda _m, _i, out: add(name, out.detach().abs().flatten(0, -2).sum(0)[None])

    def of_experts(path):
        @torch.no_grad()
        def hook(module, inputs):
            for name, outputs in outputs_of_experts(module, *inputs[:2]).items():
                add(f"{path}.{name}", torch.stack([o.abs().sum(0) for o in outputs]))

        return hook

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            module.register_forward_hook(of_linear(f"{name}.weight"))
    for path, module in modules_of_experts(model).items():
        module.register_forward_pre_hook(of_experts(path))
    parameters = dict(model.named_parameters())
    decay = [[p for p in parameters.values() if (p.dim() > 1) == two] for two in (True, False)]
    groups = [{"params": decay[0], "weight_decay": WEIGHT_DECAY}]
    groups += [{"params": decay[1], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    kept = []
    for batches in steps:
        magnitude.clear()
        optimizer.zero_grad()
        step_loss("llama", model, batches).backward()
        keeps = {}
        for name, n in magnitude.items():  # [experts, rows]; of a linear [1, rows]
            best = n.argsort(dim=1, descending=True)[:, : kept_count(n.shape[1], THRESHOLD)]
            keep = torch.zeros_like(n, dtype=torch.bool).scatter_(1, best, True)
            keeps[name] = keep & n.any(1, keepdim=True)  # not of an expert without a token
        kept.append({name: k.flatten() for name, k in keeps.items()})
        transposed = kind == "gpt_oss"
        along = {
            n: k[:, None] if transposed and "experts" in n else k[..., None]
            for n, k in keeps.items()
        }
        before = {n: parameters[n].detach().clone() for n in along}
        for n, k in along.items():
            parameters[n].grad *= k.view(k.shape[-parameters[n].dim() :])
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        for n, k in along.items() if strict else ():
            k = k.view(k.shape[-parameters[n].dim() :])
            parameters[n].data = torch.where(k, parameters[n].data, before[n])
    return {n: p.detach() for n, p in parameters.items()}, kept


def compare_all():
    cases = [
        ("mixtral", "zero2", "gradient", 1),
        ("mixtral", "zero3", "strict", 2),
        ("mixtral", "fsdp", "gradient", 2),
        ("gpt_oss", "zero0", "strict", 1),
        ("gpt_oss", "zero1", "gradient", 2),
        ("gpt_oss", "zero3", "gradient", 1),
        ("gpt_oss", "fsdp", "strict", 1),
    ]
    out = {}
    for kind, engine, update, accumulation in cases:
        steps = micro_batches(kind, 3, world_size() * accumulation)
        expected, kept = train_reference(kind, steps, update == "strict")
        recipe = recipe_for("llama", 2 * world_size() * accumulation)
        recipe.mask.update = update
        build = fsdp_engine if engine == "fsdp" else zero_engine
        sharded = build(tiny(kind), recipe, ENGINES.get(engine, {}))
        weights, found = train_shares(sharded, recipe, steps)
        flips = sum(
            int((rows != known[n]).sum())
            for known, step in zip(kept, found, strict=True)
            for n, rows in step.items()
        )
        assert [set(step) for step in found] == [set(step) for step in kept]
        difference = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
        out[kind, engine, update, accumulation] = flips, difference
    return out


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_engine_equals_the_reference(ranks):
    """Three ranks cut rows, and hold two, two and one expert."""
    for results in run_ranks(compare_all, ranks):
        for case, (flips, difference) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_looking_at_the_experts_changes_nothing(kind):
    """Outputs and gradients, also of what torch has no grouped product for; and afterwards they
    compute as before."""
    for width in (12, 6):  # rows of 24 bytes are not aligned
        torch.manual_seed(0)
        sizes = {**SIZES, "intermediate_size": width}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        model.set_experts_implementation("eager")
        ids, found = torch.randint(3, 53, (2, 9)), []
        for look in (False, True):
            mask = GradientMask(model, Mask(), seed=0) if look else None
            model.zero_grad()
            logits = model(input_ids=ids).logits
            logits.square().mean().backward()
            found.append([logits, *(p.grad.clone() for p in model.parameters())])
            if mask:
                mask.close()
        for plain, seen in zip(*found, strict=True):
            torch.testing.assert_close(plain, seen, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(input_ids=ids).logits, found[0][0])


def test_each_expert_has_its_share_of_rows_and_one_without_a_token_has_none():
    model = tiny("mixtral")
    [(path, first), _] = modules_of_experts(model).items()
    routes = []
    first.register_forward_pre_hook(lambda _m, inputs: routes.append(inputs[1]))
    mask = GradientMask(model, Mask(), seed=0)
    with mask.recording(torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]])):  # two tokens, six of padding
        model(input_ids=torch.arange(5, 13)[None]).logits[:, :2].square().sum().backward()
    kept = mask.apply(ParameterShards(model), 1)
    chosen = set(routes[0][:2].flatten().tolist())
    assert 2 <= len(chosen) < EXPERTS
    rows = mask.rows_by_name(mask.keep)[f"{path}.down_proj"][0].view(EXPERTS, -1)
    for expert in range(EXPERTS):
        assert int(rows[expert].sum()) == (kept_count(12, 0.7) if expert in chosen else 0)
        assert torch.equal(first.down_proj.grad[expert].abs().sum(1) > 0, rows[expert])
    assert kept == int(mask.keep.sum()) / mask.keep.numel()
    counts = count_rows(mask.targets, 0.7, "exact")
    assert counts["ffn_out"] == {"linears": 10, "rows": 120, "kept": 10 * kept_count(12, 0.7)}


def test_a_gate_and_what_it_gates_are_parts_of_an_expert():
    parts = {t.component: t.parts for t in find_targets(tiny("mixtral"), split_fused=True)}
    assert parts["ffn_in"] == (16, 16) * EXPERTS
    assert parts["ffn_out"] == (12,) * EXPERTS
    with pytest.raises(UserError, match="split_fused: has no effect"):  # its gates alternate
        find_targets(tiny("gpt_oss"), split_fused=True)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_rows_of_experts_have_their_weights_in_groups(kind):
    for target in find_targets(tiny(kind), ["ffn"]):
        rows, weight = weight_rows(target), target.weight
        each = target.rows // EXPERTS
        for row in (0, 3, each, target.rows - 1):
            of_expert = weight[row // each]
            expected = of_expert[:, row % each] if kind == "gpt_oss" else of_expert[row % each]
            assert torch.equal(rows[row], expected)


def test_operations_and_activations_are_counted():
    """Of the experts that a token is sent to: as torch counts, and as autograd keeps."""
    model, kept = tiny("mixtral"), {}
    model.set_experts_implementation("eager")
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    ids = torch.randint(5, 53, (2, 12))

    def keep(t):
        kept[t.untyped_storage()._cdata] = t
        return t

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = model(input_ids=ids).logits
        logits.sum().backward()
    recipe = recipe_for("llama", 2)
    recipe.data.sequence_length = 0
    per_token, per_prediction = training_flops(model, recipe)
    counted = counter.get_flop_counts()["Global"].items()
    products = sum(n for op, n in counted if str(op) in ("aten.mm", "aten.addmm"))
    assert 24 * (per_token + per_prediction) == pytest.approx(products, rel=1e-6)
    recipe.data.sequence_length = 12
    with torch.device("meta"):
        empty = type(model)(model.config)
    guess = activations(empty, recipe, "fp32") - 12 * logits.numel()
    real = sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in own)
    assert guess == pytest.approx(real, rel=0.15), (guess, real)


def test_what_experts_cannot_have_is_refused_by_name():
    """Of a model without weights, so before any is loaded."""
    with torch.device("meta"):
        model = tiny("mixtral")
    with pytest.raises(UserError, match=r"experts.gate_up_proj belongs to a MixtralExperts"):
        masked_targets(model, Mask(backward="row_sparse"))
    with pytest.raises(UserError, match=r"mask.refresh: stage splits plain linears.*experts"):
        masked_targets(model, Mask(refresh="stage"))
    attention = Mask(refresh="stage", backward="row_sparse", components=["attention"])
    assert {t.component for t in masked_targets(model, attention)} == {"q", "k", "v", "o"}
    with pytest.raises(UserError, match=r"LoRA, das, hft and ssu.*model.lora.targets"):
        adapted_linears(model, Lora())
    assert len(adapted_linears(model, Lora(targets=["q_proj"]))) == 2
    adapted = peft.get_peft_model(tiny("mixtral"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert {t.component for t in find_targets(adapted)} == {"q"}  # the experts are frozen
