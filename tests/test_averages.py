"""Averages of weights and gates of the loss: what defines each, under every engine."""

import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from pipeline.engine.optimizer import weight_groups
from pipeline.errors import UserError
from pipeline.method_settings import Distill as KlSettings
from pipeline.method_settings import Ema as EmaSettings
from pipeline.method_settings import EntropyGate as GateSettings
from pipeline.method_settings import PublishAverage
from pipeline.methods.averages import Ema, StartAverage
from pipeline.methods.distill import Distill
from pipeline.methods.entropy_gate import EntropyGate, gates
from pipeline.methods.method import Start, Teacher, published
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import rank, world_size
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import train_stage
from tests.reference import CLIP, MODELS, WEIGHT_DECAY, micro_batches, train_reference
from tests.spawn import run_ranks
from tests.test_engine import BUILDS
from tests.test_parity import recipe_for

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
CHOSEN = list(BUILDS) if EVERYTHING else ["zero1", "zero2", "zero3", "fsdp"]
STEPS, DECAY, SHARE = 3, 0.7, 0.3
NAME = "roberta"


def begin(kind, recipe, methods, name=NAME):
    """The engine of a stage 1 whose methods are prepared."""
    build, settings = BUILDS[kind]
    engine = build(MODELS[name]().train(), recipe, settings)
    start = Start(
        1, recipe, None, lambda which: Teacher(lambda: teacher(name), dict), None, None, None, None,
        engine,
    )  # fmt: skip
    for method in methods:
        method.prepare(start)
    engine.start_stage(0)
    return engine


def teacher(name):
    """Another model of the same shape."""
    net = MODELS[name]().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    for p in net.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net


def weights(engine):
    return {n: w.clone() for n, w in engine.full_weights()}


def own(engine):
    return [
        s.tensor.clone() for s in engine.shards.weight_shards(list(dict(engine.full_weights())))
    ]


def furthest(found, expected):
    return max(float((found[n] - w).abs().max()) for n, w in expected.items())


def averaged(kind, precision="fp32"):
    """What was published within the stage and at its end; whether looking left no trace."""
    recipe = recipe_for(NAME, 2 * world_size())
    recipe.train.precision = precision
    recipe.ema, recipe.publish_average = EmaSettings(DECAY), PublishAverage(SHARE)
    methods = [Ema(recipe), StartAverage(recipe)]
    engine = begin(kind, recipe, methods)
    mask = GradientMask(engine.module, recipe.mask, seed=0)
    steps = micro_batches(NAME, STEPS, world_size())
    seen = {}

    def after_step(step):
        if step == 2:
            before = weights(engine), own(engine)
            with published(engine, methods):
                seen["within"] = weights(engine)
            after = weights(engine), own(engine)
            seen["same"] = all(torch.equal(w, after[0][n]) for n, w in before[0].items())
            seen["same"] &= all(map(torch.equal, before[1], after[1]))

    mine = iter([step[rank() :: world_size()] for step in steps])
    train_stage(engine, mask, mine, recipe, 1, STEPS, None, after_step, methods=methods)
    for method in methods:
        method.finish(engine, 1)
    masters, lower = weights(engine), own(engine)
    if precision == "bf16" and kind != "fsdp":  # the model's own weights follow
        whole = [masters[n].bfloat16() for n in masters]
        seen["rounded"] = kind == "zero3" or all(
            torch.equal(w.flatten(), low.flatten()) for w, low in zip(whole, lower, strict=True)
        )
    mask.close()
    engine.close()
    return seen["same"], seen["within"], masters, seen.get("rounded", True)


def averaged_everywhere():
    """Distances from the closed forms over the reference's weights after each step, in one process
    of plain PyTorch."""
    steps = micro_batches(NAME, STEPS, world_size())
    way = [dict(MODELS[NAME]().named_parameters())]
    way += [train_reference(NAME, steps[:i])[0] for i in range(1, STEPS + 1)]
    out = {}
    for kind in CHOSEN:
        same, within, end, _ = averaged(kind)
        out[kind] = (
            same,
            *(
                furthest(found, closed_form(way[: done + 1]))
                for found, done in ((within, 2), (end, STEPS))
            ),
        )
    same, *_, rounded = averaged("zero2", "bf16")
    out["bf16"] = same and rounded, 0.0, 0.0
    return out


def closed_form(way):
    """of the weights w_0 ... w_t: SHARE w_0 + (1 - SHARE) (d^t w_0 + (1 - d) sum_i d^(t-i) w_i)."""
    t = len(way) - 1
    expected = {}
    for name, first in way[0].items():
        ema = DECAY**t * first.detach()
        for i in range(1, t + 1):
            ema = ema + (1 - DECAY) * DECAY ** (t - i) * way[i][name]
        expected[name] = SHARE * first.detach() + (1 - SHARE) * ema
    return expected


@pytest.mark.parametrize("ranks", [1, 2] if EVERYTHING else [2])
def test_averages_are_their_closed_forms_under_every_engine(ranks):
    for results in run_ranks(averaged_everywhere, ranks):
        for kind, (same, within, end) in results.items():
            assert same, kind
            assert within < 1e-6, kind
            assert end < 1e-6, kind


def test_a_prediction_counts_by_its_entropy_among_the_likeliest():
    """By hand: of two tokens with 3/4 and 1/4, 0.8113 bits of 1."""
    logits = torch.tensor([[math.log(3), 0.0, -99.0], [0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    assert gates(logits, 2).tolist() == pytest.approx([0.81128, 1.0, 0.0], abs=1e-5)
    assert gates(logits, 20)[1] == 1  # fewer tokens than are asked for
    assert gates(logits, 3)[0] == pytest.approx(0.562335 / math.log(3), abs=1e-5)


def gated(kind, name):
    """Weights after two steps with both gates, and the losses that were logged."""
    recipe = recipe_for(name, 2 * world_size())
    recipe.mask.enabled = False
    recipe.entropy_gate, recipe.kd = GateSettings(tokens=5), KlSettings(weight=0.4)
    methods = [EntropyGate(recipe), Distill(recipe)]
    engine = begin(kind, recipe, methods, name)
    steps = micro_batches(name, 2, world_size())
    mine = iter([step[rank() :: world_size()] for step in steps])
    train_stage(engine, None, mine, recipe, 1, 2, None, methods=methods)
    found = weights(engine)
    engine.close()
    return found


def gated_by_hand(name):
    """The same in one process: the gradient of mean(H / ln k * cross-entropy + 0.4 KL) with respect
    to the logits, written out, through the model's own backward."""
    model, frozen = MODELS[name]().train(), teacher(name)
    recipe = recipe_for(name, 2)
    o = recipe.optimizer
    adam = torch.optim.AdamW(
        weight_groups(model, WEIGHT_DECAY), lr=o.lr, betas=tuple(o.betas), eps=o.eps
    )
    for batches in micro_batches(name, 2, world_size()):
        labels = [b["labels"] for b in batches]
        if name != "roberta":
            labels = [F.pad(x[:, 1:], (0, 1), value=-100) for x in labels]
        count = sum(int((x >= 0).sum()) for x in labels)
        for batch, targets in zip(batches, labels, strict=True):
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            wanted = targets >= 0
            logits = model(**inputs).logits[wanted]
            ours = logits.detach().softmax(-1)
            with torch.no_grad():
                theirs = frozen(**inputs).logits[wanted].softmax(-1)
            top = logits.detach().topk(5).values.softmax(-1)
            gate = -(top * top.log()).sum(-1, keepdim=True) / math.log(5)
            right = F.one_hot(targets[wanted], ours.shape[-1])
            logits.backward((gate * (ours - right) + 0.4 * (ours - theirs)) / count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad()
    return dict(model.named_parameters())


def gated_everywhere():
    kinds = CHOSEN if EVERYTHING else ["zero2", "zero3", "fsdp"]
    return {
        (kind, name): furthest(gated(kind, name), gated_by_hand(name))
        for kind, name in zip(kinds, itertools.cycle(("roberta", "llama")), strict=False)
    }


def test_the_gradients_of_the_gates_are_those_by_hand_under_every_engine():
    for results in run_ranks(gated_everywhere, 2):
        for case, difference in results.items():
            assert difference < 1e-6, case


def test_the_teacher_is_the_base_or_what_was_published_last():
    for which, expected in (("base", ["base", "base"]), ("previous", ["base", "previous"])):
        recipe = recipe_for(NAME, 2)
        recipe.kd = KlSettings(teacher=which)
        method, asked = Distill(recipe), []
        for stage in (1, 2):
            method.prepare(
                SimpleNamespace(
                    stage=stage,
                    teacher=lambda w, asked=asked: asked.append(w) or Teacher(lambda: None, dict),
                    engine=SimpleNamespace(frozen=lambda model: model or "forward"),
                )
            )
        assert asked == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("publish_average={start: 0}", "publish_average.start"),
        ("publish_average={start: 1.2}", "publish_average.start"),
        ("ema={decay: 1}", "ema.decay"),
        ("entropy_gate={tokens: 1}", "entropy_gate.tokens"),
        ("kd={weight: -1}", "kd.weight"),
    ],
)
def test_settings_of_companions_that_make_no_sense(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: unused/model, objective: causal}\n"
        "data: {domains: {a: {embedded: math}}}\nstages: [{domain: a, steps: 9}]\n"
    )
    with pytest.raises(UserError, match=message):
        load_recipe(path, [override])
    load_recipe(path, [override.partition("=")[0] + "={}"])  # the defaults work
    with pytest.raises(UserError, match="factors"):
        load_recipe(path, ["publish_average={}", "model.lora={}"])
