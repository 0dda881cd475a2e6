"""LoRA and QLoRA under the mask: A by the output of A, B by the output of the whole layer."""

import itertools
import json
import math
import shutil
from fractions import Fraction

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from eval.measure.lm import measure_in_engine
from pipeline.engine.config import check_quantized, resolve_ds_config
from pipeline.errors import UserError
from pipeline.migu.targets import find_targets
from pipeline.model.load import build_model, load_config, load_for_evaluation
from pipeline.model.lora import adapted_linears, add_adapter, base_of
from pipeline.ranks import world_size
from pipeline.recipe import Lora, Mask, Model
from pipeline.run.dry_run import describe_run
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.reference import (
    BETAS,
    CLIP,
    EPS,
    LR,
    MODELS,
    THRESHOLD,
    WEIGHT_DECAY,
    masked_linears,
    micro_batches,
    step_loss,
)
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, EVERYTHING, recipe_for, train_shares, zero_engine
from tests.test_run import recipe  # noqa: F401  # a fixture

RANK, ALPHA, STEPS = 5, 10, 2


def with_adapter(model: nn.Module) -> nn.Module:
    """Adds an adapter whose B is not zero, so that A has a gradient in the first step."""
    add_adapter(model, Lora(r=RANK, alpha=ALPHA, dropout=0.0), None, None, None, seed=3)
    return randomize_b(model)


def randomize_b(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


class ReferenceLora(nn.Module):
    """Eq. 7-9 of the paper, with x's magnitudes n_A and n_O (Eq. 2) cached over a step."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor):
        super().__init__()
        self.linear = linear
        self.weight = linear.weight  # T5 looks at its dtype
        self.A = nn.Parameter(a.clone())  # the transposed A of the paper: [r, d_in]
        self.B = nn.Parameter(b.clone())  # [d_out, r]
        self.n: dict[str, torch.Tensor] = {}

    def forward(self, x):
        x_a = x @ self.A.T
        x_b = x_a @ self.B.T
        x_o = self.linear(x) + ALPHA / RANK * x_b
        for name, out in (("A", x_a), ("B", x_o)):
            self.n[name] = self.n.get(name, 0) + out.detach().abs().flatten(0, -2).sum(0)
        return x_o


def train_reference(name: str, steps: list[list[dict]]) -> tuple[dict, list[dict]]:
    """Returns (A and B of each layer, per step their kept rows), named as PEFT names them."""
    start = with_adapter(MODELS[name]()).state_dict()
    model = MODELS[name]().requires_grad_(False)
    layers = {}
    for n, linear in masked_linears(name, model).items():
        parent, _, last = n.rpartition(".")
        a, b = (start[f"{n}.lora_{x}.default.weight"] for x in "AB")
        layers[n] = ReferenceLora(linear, a, b)
        setattr(model.get_submodule(parent), last, layers[n])
    weights = {
        f"{n}.lora_{x}.default.weight": (layer, x) for n, layer in layers.items() for x in "AB"
    }
    trained = [getattr(layer, x) for layer, x in weights.values()]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    kept = []
    for batches in steps:
        for layer in layers.values():
            layer.n.clear()
        optimizer.zero_grad()
        step_loss(name, model, batches).backward()
        masks = {}
        for full, (layer, x) in weights.items():
            d = len(layer.n[x])
            top = layer.n[x].argsort(descending=True)
            top = top[: d - math.floor(Fraction(str(THRESHOLD)) * d)]
            masks[full] = torch.zeros(d, dtype=torch.bool).index_fill(0, top, True)
            getattr(layer, x).grad *= masks[full][:, None]
        kept.append(masks)
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
    return {n: getattr(layer, x).detach() for n, (layer, x) in weights.items()}, kept


def train(name, model, engine, steps, accumulation, build=zero_engine, **changes):
    """Train this rank's share of `steps`; returns (weights, kept rows per step)."""
    settings = recipe_for(name, 2 * world_size() * accumulation)
    settings.optimizer.weight_decay = changes.pop("weight_decay", WEIGHT_DECAY)
    settings.mask = Mask(threshold=THRESHOLD, **changes)
    return train_shares(build(model.train(), settings, engine), settings, steps)


def compare(name, engine, accumulation, checkpoint=False, build=zero_engine):
    """(rows selected otherwise, adapter's largest difference, base weights that moved)."""
    steps = micro_batches(name, STEPS, world_size() * accumulation)
    expected, kept = train_reference(name, steps)
    model = with_adapter(MODELS[name]())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights, history = train(name, model, engine, steps, accumulation, build)
    assert [list(found) for found in history] == [list(masks) for masks in kept]
    flips = sum(
        int((rows != masks[n]).sum())
        for masks, found in zip(kept, history, strict=True)
        for n, rows in found.items()
    )
    difference = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
    moved = [n for n, w in weights.items() if n not in expected and not torch.equal(w, before[n])]
    return flips, difference, moved


def compare_all():
    out = {}
    for i, name in enumerate(MODELS):
        for j, engine in enumerate(("zero0", "zero2", "zero3")):
            # One accumulation for each model and engine: over them, each engine and each model
            # sees both. RUN_EVERYTHING=1 takes the whole product.
            for accumulation in (1, 3) if EVERYTHING else [(1, 3)[(i + j) % 2]]:
                key = f"{name}, {engine}, accumulation {accumulation}"
                out[key] = compare(name, ENGINES[engine], accumulation)
    if world_size() == 1:
        for name in MODELS:
            out[f"{name}, checkpointing"] = compare(name, ENGINES["zero3"], 3, checkpoint=True)
    else:
        for name, accumulation in itertools.product(MODELS, (1, 3)):
            if EVERYTHING or (name, accumulation) in (("gpt2", 1), ("t5", 3)):
                key = f"{name}, fsdp, accumulation {accumulation}"
                out[key] = compare(name, {}, accumulation, build=fsdp_engine)
    return out


@pytest.fixture(scope="module", params=[1, 2])
def measured(request, tmp_path_factory):
    """What every rank found, of 1 and of 2: (compare_all, all_steps)."""
    folder = tmp_path_factory.mktemp("roberta")
    MODELS["roberta"]().save_pretrained(folder)
    return run_ranks(measure, request.param, str(folder))


def measure(folder):
    return compare_all(), all_steps(folder)


def test_an_adapter_equals_the_reference(measured):
    for results, _ in measured:
        for case, (flips, difference, moved) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case
            assert not moved, case


def one_step(folder, quantize, engine, **changes):
    """One step without weight decay; returns (wrong layers, trained weights, frozen that moved).

    A layer is wrong where the rows that changed are not exactly the kept ones.
    """
    settings = Model(path=folder, lora=Lora(r=RANK, alpha=ALPHA, quantize=quantize))
    model = randomize_b(build_model(settings, load_config(settings), None, seed=0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = micro_batches("roberta", 1, world_size())
    weights, [kept] = train("roberta", model, ENGINES[engine], steps, 1, weight_decay=0, **changes)
    wrong = [n for n, k in kept.items() if not torch.equal((weights[n] != before[n]).any(1), k)]
    moved = [n for n, w in weights.items() if n not in kept and not torch.equal(w, before[n].cpu())]
    ranked = {n: before[n].abs().sum(1).argsort(descending=True) for n in kept}
    by_weight = [n for n, k in kept.items() if k[ranked[n][: int(k.sum())]].all()]
    return wrong, len(kept), moved, len(by_weight)


def all_steps(folder):
    if world_size() == 1:
        criteria = ("weight", "gradient", "random")
        return {c: one_step(folder, "none", "zero2", criterion=c) for c in criteria}
    quantized = (("4bit", "zero0"), ("4bit", "zero2"), ("4bit", "zero3"), ("8bit", "zero2"))
    return {f"{q}, {e}": one_step(folder, q, e) for q, e in quantized}


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_an_evaluation_changes_no_gradient_of_a_quantized_model(tmp_path, quantize):
    """On some CPUs bitsandbytes packs 4-bit weights for inference, where they lose theirs."""
    MODELS["llama"]().save_pretrained(tmp_path)
    lora = Lora(r=RANK, dropout=0, quantize=quantize)
    settings = Model(path=str(tmp_path), objective="causal", lora=lora)
    model = randomize_b(build_model(settings, load_config(settings), None, seed=0)).train()
    [batches] = micro_batches("llama", 1, 1)
    found = []
    for _ in range(2):
        model.zero_grad()
        step_loss("llama", model, batches).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        with torch.no_grad():
            step_loss("llama", model.eval(), batches)
        model.train()
    first, second = found
    assert all(g.any() and torch.equal(g, second[n]) for n, g in first.items())


def test_a_step_moves_exactly_the_kept_rows(measured):
    """QLoRA, and LoRA with the other criteria."""
    for _, results in measured:
        for case, (wrong, masked, moved, by_weight) in results.items():
            assert (wrong, masked, moved) == ([], 24, []), case
            assert (by_weight == masked) == (case == "weight")


def whole_run(path, runs):
    """Two stages, the second one with next to no learning rate; returns what the dry run says."""
    settings = ["model.lora={}", "model.gradient_checkpointing=true"]
    settings += ["optimizer.lr=0.1", "stages[1].lr=1e-12"]
    loaded = load_recipe(path, settings)
    config = resolve_ds_config({"zero_optimization": {"stage": 2}}, loaded, 1, "cpu")

    text = describe_run(loaded, config, 1)
    run_recipe(loaded, config, runs, measure_in_engine, pytest.fail, lambda folder: folder)
    return text


def test_stage_2_continues_the_adapter_of_stage_1(recipe, tmp_path):  # noqa: F811
    text = run_ranks(whole_run, 1, recipe, tmp_path / "runs")[0]
    assert "LoRA of rank 8 on 6 linears, alpha 32, dropout 0.05: trains 1,664 parameters" in text
    assert "frozen in" not in text
    stages = tmp_path / "runs" / "tiny" / "stages"
    first, second = (stages / s / "checkpoint" for s in ("01_a", "02_b"))
    files = {p.name for p in second.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not any(f.startswith("model") for f in files)
    assert base_of(second) == (str((stages / "00_base" / "checkpoint").resolve()), None)

    a, b = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    assert all(float((a[k] - b[k]).abs().max()) < 1e-9 for k in a)
    assert all(bool(a[k].any()) for k in a)
    results = [json.loads((stages / s / "eval.json").read_text()) for s in
               ("00_base", "01_a", "02_b")]  # fmt: skip
    losses = [[d["loss"] for d in r["domains"].values()] for r in results]
    assert losses[2] == pytest.approx(losses[1], abs=1e-6)
    assert losses[1][0] < losses[0][0] - 0.01
    for r in results:  # the same rows are compared, with an adapter or without
        assert list(r["overlap"]["kinds"]) == ["q", "k", "v", "o", "ffn_in", "ffn_out"]

    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = tmp_path / "moved" / second.relative_to(tmp_path / "runs")
    net = load_for_evaluation(moved, "masked", "sdpa")
    assert torch.equal(
        net.get_parameter("roberta.encoder.layer.0.output.dense.lora_B.default.weight"),
        b["base_model.model.roberta.encoder.layer.0.output.dense.lora_B.weight"],
    )
    with pytest.raises(UserError, match="is an adapter; give its base model"):
        load_config(Model(path=str(moved)))
    shutil.rmtree(tmp_path / "moved" / "tiny" / "stages" / "00_base")
    with pytest.raises(UserError, match=r"its base model .* is gone"):
        load_for_evaluation(moved, "masked", "sdpa")


def tuned(config) -> nn.Module:
    return peft.get_peft_model(MODELS["llama"](), config)


LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def test_peft_models_are_masked_like_ours():
    names = [t.name for t in find_targets(tuned(peft.LoraConfig(**LORA)), ["q"])]
    assert names == [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.default.weight"
                     for i in (0, 1) for x in "AB"]  # fmt: skip


def test_adapters_that_cannot_be_masked_are_refused():
    refused = {
        "DoRA cannot be masked": peft.LoraConfig(**LORA, use_dora=True),
        "IA3 cannot be masked": peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "target_parameters": peft.LoraConfig(
            r=2, target_modules=[], target_parameters=["q_proj.weight"]
        ),
        "LoRA on Embedding": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    }
    for message, config in refused.items():
        with pytest.raises(UserError, match=message):
            find_targets(tuned(config))
    merged = tuned(peft.LoraConfig(**LORA))
    merged.merge_adapter()
    with pytest.raises(UserError, match="its adapter is merged"):
        find_targets(merged)
    with (
        (off := tuned(peft.LoraConfig(**LORA))).disable_adapter(),
        pytest.raises(UserError, match="its adapter is disabled"),
    ):
        find_targets(off)
    with pytest.raises(UserError, match="does not train the output head"):
        find_targets(off, ["head"])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    with pytest.raises(UserError, match="3-D parameter"):
        adapted_linears(mixture, Lora())
    assert len(adapted_linears(mixture, Lora(targets=["q_proj"]))) == 1
    with pytest.raises(UserError, match=r"is named 'dense'; there are .*q_proj"):
        adapted_linears(MODELS["llama"](), Lora(targets=["q_proj", "dense"]))


def test_mistakes_in_the_recipe_are_explained(recipe):  # noqa: F811
    loaded = load_recipe(recipe, ["model.lora={}"]).model.lora
    assert loaded == Lora(r=8, alpha=32, dropout=0.05, targets=None, quantize="none")
    assert load_recipe(recipe).model.lora is None
    with pytest.raises(UserError, match=r"model.lora.rr: unknown key.*did you mean 'r'"):
        load_recipe(recipe, ["model.lora={rr: 4}"])
    with pytest.raises(UserError, match=r"(?s)lora.r: 0.*lora.dropout: 1.*lora.targets: the list"):
        load_recipe(recipe, ["model.lora={r: 0, dropout: 1, targets: []}"])
    zero3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    check_quantized(Lora(), zero3)
    for quantize, config, message in (
        ("8bit", {"zero_optimization": {"stage": 3}}, "8bit does not work under ZeRO-3"),
        ("4bit", zero3, "cannot be offloaded"),
        ("4bit", {"fsdp": {}}, "FSDP does not shard quantized weights"),
    ):
        with pytest.raises(UserError, match=message):
            check_quantized(Lora(quantize=quantize), config)
