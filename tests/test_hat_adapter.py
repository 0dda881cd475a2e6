"""HAT over the ranks of an adapter: equal to a plain loop, and what it promises of old stages."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.method_settings import HatAdapter as HatSettings
from pipeline.methods.hat_adapter import HatAdapter
from pipeline.methods.method import published
from pipeline.model.lora import add_adapter
from pipeline.ranks import rank, world_size
from pipeline.recipe import Lora, Stage
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import train_stage
from tests.reference import BETAS, CLIP, EPS, LR, MODELS, micro_batches, step_loss
from tests.spawn import run_ranks
from tests.test_anchor import BUILDS
from tests.test_anchor_run import build_base
from tests.test_methods import run
from tests.test_parity import recipe_for
from tests.test_run import tiny_recipe

NAME, RANKS, STEPS = "roberta", 6, 4
SETTINGS = HatSettings(lr=20.0, sparsity=0.01, steepness=40.0)


def adapted():
    """Neither A nor B is zero."""
    model = MODELS[NAME]().train()
    add_adapter(model, Lora(r=RANKS, alpha=12, dropout=0.0), None, None, None, seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def gates_on(model, gate):
    """Multiply the output of every A by gate(its place)."""
    layers = [m for n, m in model.named_modules() if n.endswith("lora_A.default")]
    return [
        layer.register_forward_hook(lambda _m, _i, output, i=i: output * gate(i))
        for i, layer in enumerate(layers)
    ]


def plain():
    """For each of two stages: (the adapter, its open gates) of a loop that lets autograd find the
    gradient of the gates."""
    model, found, most = adapted(), [], SETTINGS.steepness
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    linears = [n.removesuffix(".lora_A.default.weight") for n in trained if "lora_A" in n]
    claimed = torch.zeros(len(linears), RANKS)
    for stage in (1, 2):
        e = torch.randn(len(linears), RANKS, generator=torch.Generator().manual_seed(stage))
        optimizer = torch.optim.AdamW(
            trained.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0
        )
        for step, batches in enumerate(micro_batches(NAME, STEPS, 2)):
            s = 1 / most + (most - 1 / most) * step / (STEPS - 1)
            open_ = torch.sigmoid(s * e).requires_grad_()
            hooks = gates_on(model, lambda i, open_=open_: open_[i])
            optimizer.zero_grad()
            step_loss(NAME, model, batches).backward()
            for hook in hooks:
                hook.remove()
            regulariser = SETTINGS.sparsity * (1 - claimed) / (1 - claimed).sum()
            x, wide = s * e.double(), e.double()  # the slope of a shut gate is no number of fp32
            slope = s * torch.sigmoid(x) * torch.sigmoid(-x)
            compensated = most * (torch.cosh(x) + 1) / (s * (torch.cosh(wide) + 1))
            e -= SETTINGS.lr * (open_.grad + regulariser) * (slope * compensated).float()
            e.clamp_(-6, 6)
            for i, linear in enumerate(linears):
                trained[f"{linear}.lora_A.default.weight"].grad *= 1 - claimed[i][:, None]
                trained[f"{linear}.lora_B.default.weight"].grad *= 1 - claimed[i]
            torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
            optimizer.step()
        gates = (e > 0).float()
        claimed = torch.maximum(claimed, gates)
        found.append(
            (
                {n: p.detach().clone() for n, p in trained.items()},
                dict(zip(linears, gates, strict=True)),
            )
        )
    return found


def folded(weights, gates):
    """The adapter whose A has the open gates in it."""
    rows = {f"{n}.lora_A.default.weight": g[:, None] for n, g in gates.items()}
    return {n: w * rows.get(n, 1.0) for n, w in weights.items()}


def trained(kind, folder):
    """For each of two stages: (what is published, what is kept)."""
    build, settings = BUILDS[kind]
    recipe = recipe_for(NAME, 2 * 2)
    recipe.optimizer.weight_decay = 0.0
    recipe.model.lora, recipe.hat_adapter = Lora(r=RANKS), SETTINGS
    recipe.stages = [Stage("x", steps=STEPS)] * 2
    engine, method, found = build(adapted(), recipe, settings), HatAdapter(recipe), []
    names = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    for stage in (1, 2):
        method.prepare(SimpleNamespace(engine=engine, stage=stage, kept=folder / kind))
        engine.start_stage()

        def after_step(step):
            """As if the stage broke off here and went on; and what an evaluation would see."""
            method.load_state_dict(json.loads(json.dumps(method.state_dict())))
            before = {n: w.clone() for n, w in engine.full_weights(names=names)}
            with published(engine, [method]):
                seen = {n: w.clone() for n, w in engine.full_weights(names=names)}
            after = dict(engine.full_weights(names=names))
            assert all(torch.equal(w, after[n]) for n, w in before.items())
            assert all(torch.equal(w, before[n]) or "lora_A" in n for n, w in seen.items())
            shut = sum(int((w == 0).all(1).sum()) for n, w in seen.items() if "lora_A" in n)
            assert 0 < shut < RANKS * len(names) / 2

        mine = (step[rank() :: world_size()] for step in micro_batches(NAME, STEPS, 2))
        train_stage(engine, None, mine, recipe, stage, STEPS, None, after_step, methods=[method])
        method.finish(engine, stage)
        whole = {n: w.clone() for n, w in engine.full_weights(names=names)}
        found.append((whole, load_file(folder / f"{kind}/hat_adapter/stage-0{stage}.safetensors")))
    engine.close()
    return found


def compare(folder):
    expected = plain()
    out = {}
    for kind in ("zero2", "zero3", "fsdp"):
        worst = 0.0
        for (whole, kept), (weights, gates) in zip(trained(kind, folder), expected, strict=True):
            found = {n: g for n, g in kept.items() if n.endswith(".gates")}
            assert all(torch.equal(found[f"{n}.gates"], gates[n]) for n in gates), kind
            for found, wanted in ((whole, folded(weights, gates)), (kept, weights)):
                worst = max(
                    [worst, *(float((found[n] - w).abs().max()) for n, w in wanted.items())]
                )
        out[kind] = worst
    return out


def test_gates_claim_ranks_as_a_plain_loop_does_on_every_engine(tmp_path):
    for found in run_ranks(compare, 2, tmp_path):
        assert found.keys() == {"zero2", "zero3", "fsdp"}
        assert max(found.values()) < 1e-6, found


def test_what_a_stage_has_claimed_stays_and_a_broken_run_is_the_same(tmp_path):
    """With the gates of a stage the adapter of any later one is what that stage has published, to
    the bit. A second stage that starts from what is kept ends as one in the same process."""
    model = f"model={{path: {build_base(tmp_path / 'base')}, objective: causal, lora: {{r: 4}}}}"
    settings = [
        model,
        "hat_adapter={lr: 0.5, sparsity: 0.1}",
        "optimizer.lr=0.01",
        "stages[0].evaluate_every=3",
    ]
    first, second = run(tmp_path, settings)
    old, new = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    kept = load_file(tmp_path / "runs/tiny/kept/hat_adapter/stage-02.safetensors")
    gates = load_file(tmp_path / "runs/tiny/kept/hat_adapter/stage-01.safetensors")
    for name, weight in old.items():
        rows, plain = "lora_A" in name, name.removeprefix("base_model.model.")
        claimed = gates[plain.rsplit(".", 2)[0] + ".gates"].bool()
        whole = kept[plain.replace(".weight", ".default.weight")]
        here, there = (w if rows else w.t() for w in (whole, weight))
        assert torch.equal(here[claimed], there[claimed])
        assert not rows or not there[~claimed].any()
        assert claimed.all() or not torch.equal(here, there)  # the others do move
    assert 0 < sum(g.sum() for n, g in gates.items() if n.endswith(".gates")) < 4 * len(old) / 2
    shutil.rmtree(second.parent)
    run(tmp_path, settings)
    again = load_file(second / "adapter_model.safetensors")
    assert all(torch.equal(again[n], w) for n, w in new.items())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.lora=null"], "hat_adapter: gates the ranks of an adapter; set model.lora"),
        (["model.lora.incremental=true"], "hat_adapter: gates one adapter, model.lora.incremental"),
        (["ewc={}"], "hat_adapter: ewc moves ranks that earlier stages have claimed"),
        (["optimizer.weight_decay=0.1"], "hat_adapter: optimizer.weight_decay=0.1 moves .* to 0"),
        (["start_from=base"], "start_from: base .* hat_adapter is for"),
        (["stop={domain: a, loss: 1, steps: 1}"], "hat_adapter: its gates close .* remove `stop`"),
        (["hat_adapter.steepness=1"], "hat_adapter.steepness: must be more than 1"),
    ],
)
def test_what_it_cannot_go_with_is_said(tmp_path, overrides, expected):
    whole = ["model={path: x, objective: causal, lora: {}}", "hat_adapter={}", *overrides]
    with pytest.raises(UserError, match=expected):
        load_recipe(tiny_recipe(tmp_path), whole)
