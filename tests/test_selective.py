"""MoFO and FGGM: which numbers of a weight move, by momentum and by Fisher information."""

import math
import os
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.method_settings import Mofo as MofoSettings
from pipeline.methods.mofo import Mofo, least_kept
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import rank, world_size
from pipeline.recipe import BadSteps, Mask, Stage
from pipeline.run.bad_steps import BadStepRule
from pipeline.run.recipe_file import load_recipe
from pipeline.run.stage_rows import _choose
from pipeline.run.train import train_stage
from tests.reference import (
    BETAS,
    CAUSAL,
    CLIP,
    EPS,
    LR,
    MODELS,
    WEIGHT_DECAY,
    masked_linears,
    micro_batches,
    step_loss,
)
from tests.spawn import run_ranks
from tests.test_anchor import BUILDS
from tests.test_methods import start_of
from tests.test_parity import recipe_for
from tests.test_run import tiny_recipe

STEPS, SHARE = 3, 0.15
ENGINES = [("llama", "zero3"), ("roberta", "fsdp")]
if os.environ.get("RUN_EVERYTHING"):
    ENGINES += [("llama", "zero0"), ("roberta", "zero1 offload")]
    ENGINES += [("roberta", "zero2"), ("llama", "zero3 offload")]


def test_the_threshold_is_that_of_a_sort():
    """Of weights in pieces, with ties, zeros and very small numbers."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator).abs() for n in (1, 7, 40, 1000)]
    weights += [torch.zeros(9), torch.ones(20), weights[2] * 1e-42]
    pieces = [(i, p) for i, w in enumerate(weights) for p in w.chunk(3)]
    for share in (0.15, 0.5, 0.001):
        found = least_kept(pieces, len(weights), share, torch.device("cpu"))
        for weight, bits in zip(weights, found, strict=True):
            count = math.ceil(Fraction(str(share)) * len(weight))
            expected = weight.sort(descending=True).values[count - 1]
            assert int(bits) == int(expected.view(torch.int32))


def filtered(name, kind, masked):
    """(the weights after some steps with MoFO, those after the first one, and MIGU's rows in it)"""
    build, settings = BUILDS[kind]
    recipe = recipe_for(name, 2 * world_size())
    recipe.mofo = MofoSettings(share=SHARE)
    method = Mofo(recipe)
    engine = build(MODELS[name]().train(), recipe, settings)
    method.prepare(start_of(engine))
    mask = GradientMask(engine.module, recipe.mask, 0) if masked else None
    mine = (step[rank() :: world_size()] for step in micro_batches(name, STEPS, world_size()))
    first, rows = {}, {}

    def after_step(step):
        if step == 1:
            first.update({n: w.clone() for n, w in engine.full_weights()})
            if mask:
                rows.update({n: k.clone() for n, (k, _) in mask.rows_by_name(mask.keep).items()})
        return False

    train_stage(engine, mask, mine, recipe, 1, STEPS, None, after_step, methods=[method])
    weights = {n: w.clone() for n, w in engine.full_weights()}
    engine.close()
    return weights, first, rows


def by_hand(name, ranks):
    """A plain loop: AdamW, and what is not among the largest momenta of its tensor put back."""
    model = MODELS[name]().train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    for batches in micro_batches(name, STEPS, ranks):
        optimizer.zero_grad()
        step_loss(name, model, batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            momentum = optimizer.state[p]["exp_avg"].abs()
            count = math.ceil(Fraction(str(SHARE)) * p.numel())
            least = momentum.flatten().sort(descending=True).values[count - 1]
            p.data = torch.where(momentum >= least, p.data, old)
    return {n: p.detach() for n, p in model.named_parameters()}


def momenta():
    found = {}
    for name, kind in ENGINES:
        weights, *_ = filtered(name, kind, masked=False)
        expected = by_hand(name, world_size())
        found[kind] = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
    start = dict(MODELS["llama"]().named_parameters())
    _, first, rows = filtered("llama", "zero2", masked=True)
    outside = [(first[n] != start[n]).any(1) & ~keep for n, keep in rows.items()]
    moved = {n: int((w != start[n]).sum()) / w.numel() for n, w in first.items()}
    return found, torch.cat(outside).any().item(), max(moved.values())


def test_only_the_entries_with_the_largest_momentum_move():
    for found, outside, most in run_ranks(momenta, 2):
        for kind, difference in found.items():
            assert difference < 1e-6, kind
        assert not outside  # of MIGU's rows, whose momenta alone are not zero in the first step
        assert 0.1 < most < SHARE + 0.02


def rolled_back():
    """How far the weights are from the start's after two steps and one that goes back to there."""
    build, settings = BUILDS["zero2"]
    recipe = recipe_for("llama", 2)
    recipe.mofo, recipe.bad_steps = MofoSettings(share=SHARE), BadSteps(policy="rollback")
    engine, methods = build(MODELS["llama"]().train(), recipe, settings), [Mofo(recipe)]
    methods[0].prepare(start_of(engine))
    start = [(n, w.clone()) for n, w in engine.full_weights()]
    bad = BadStepRule(recipe.bad_steps, 1, "x")
    losses = iter([None, None, "a problem"])
    bad.problem = lambda _: next(losses)

    def go_back():
        engine.load_weights(start)
        return 0

    bad.go_back = go_back
    train_stage(
        engine, None, iter(micro_batches("llama", 3, 1)), recipe, 1, 3, None, methods=methods,
        bad=bad,
    )  # fmt: skip
    found = dict(engine.full_weights())
    return max(float((found[n] - w).abs().max()) for n, w in start)


def test_a_step_that_goes_back_is_not_filtered():
    assert run_ranks(rolled_back, 1) == [0.0]


def fisher(names):
    found = {}
    for name in names:
        recipe = recipe_for(name, 4)
        recipe.stages = [Stage("x", steps=2)]
        recipe.mask = Mask(criterion="fisher", refresh="stage", calibration=8)
        steps = micro_batches(name, 2, 2)
        mine = [step[rank() :: world_size()] for step in steps]
        net = MODELS[name]().train()
        rows = _choose(net, recipe, {"fp32": {}}, 1, None, lambda mine=mine: mine)
        assert all(p.grad is None for p in net.parameters())
        found[name] = {n: k.tolist() for n, k in rows.items()}
    return found


def test_fggm_trains_the_rows_of_the_largest_fisher_information():
    """The mean of the squared gradients of each sequence's log-likelihood, whatever the ranks."""
    results = run_ranks(fisher, 2, ("roberta", "gpt2"))
    assert results[0] == results[1]
    for name, rows in results[0].items():
        model = MODELS[name]()
        sums = dict.fromkeys(masked_linears(name, model), 0.0)
        for batches in micro_batches(name, 2, 2):
            for batch in batches:
                for i in range(2):
                    one = {k: v[i : i + 1] for k, v in batch.items()}
                    labels = one.pop("labels")
                    if name in CAUSAL:
                        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
                    model.zero_grad()
                    logits = model(**one).logits.flatten(0, 1)
                    F.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
                    for n, module in masked_linears(name, model).items():
                        square = module.weight.grad**2
                        sums[n] = sums[n] + square.sum(0 if name == "gpt2" else 1)
        assert set(rows) == {f"{n}.weight" for n in sums}
        for n, scores in sums.items():
            count = len(scores) - math.floor(Fraction("0.7") * len(scores))
            best = scores.argsort(descending=True)[:count]
            assert set(best.tolist()) == {i for i, k in enumerate(rows[f"{n}.weight"]) if k}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["mofo={share: 0}"], r"mofo.share: 0.* is outside \(0, 1\)"),
        (["mask.criterion=fisher"], "mask.criterion: fisher ranks .* set mask.refresh=stage"),
    ],
)
def test_what_has_no_sense_is_said(tmp_path, overrides, problem):
    with pytest.raises(UserError, match=problem):
        load_recipe(tiny_recipe(tmp_path), overrides)
