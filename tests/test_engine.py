"""One engine for all stages: it forgets the optimizer between them, and nothing else."""

import gc
import itertools
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.measure.lm import evaluate_share, measure_in_engine
from pipeline.engine.config import resolve_ds_config, resolve_engine_config
from pipeline.methods.method import Method
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.load import load_for_evaluation
from pipeline.ranks import rank, world_size
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from pipeline.run.train import train_stage
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, EVERYTHING, recipe_for, zero_engine
from tests.test_run import recipe  # noqa: F401  # a fixture

STAGES = 3 if EVERYTHING else 2
BUILDS = {name: (zero_engine, settings) for name, settings in ENGINES.items()}
BUILDS["fsdp"] = (fsdp_engine, {})
# The weights that are not gathered again before each use are another path through ZeRO-3.
BUILDS["zero3 persistent"] = (zero_engine, {"stage": 3})


def start(name, kind, precision):
    """(engine, settings); the engine has the weights of the model's file, in fp32."""
    build, engine_settings = BUILDS[kind]
    settings = recipe_for(name, 2 * world_size())
    settings.train.precision = precision
    model = MODELS[name]().train()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = build(model, settings, engine_settings)
    engine.load_weights(weights.items())
    return engine, settings


class Beside(Method):
    """Two micro-batches of its own in the second stage, none in the others."""

    def __init__(self, name, stage):
        [batches] = micro_batches(name, 1, 2)
        self._batches = [b | {"labels": None} for b in batches] if stage == 1 else []

    def micro_batches(self):
        return len(self._batches)

    def batches(self, step):
        return self._batches

    def predictions(self, batch):
        return batch["input_ids"].numel()

    def loss(self, engine, head, batch):
        return engine.forward(**batch).logits.float().square().sum()


def train(engine, settings, name, stage):
    mask, beside = GradientMask(engine.module, settings.mask, seed=stage), Beside(name, stage)
    steps = micro_batches(name, 2 * STAGES, world_size())[2 * stage : 2 * stage + 2]
    mine = iter([s[rank() :: world_size()] for s in steps])
    engine.start_stage(beside.micro_batches())
    train_stage(engine, mask, mine, settings, 1, 2, None, methods=[beside])
    mask.close()


def snapshot(engine):
    """(fp32 weights, the module's own shards), copied."""
    masters = {n: w.clone() for n, w in engine.full_weights()}
    shards = engine.shards.weight_shards(list(masters))
    return masters, [s.tensor.clone() for s in shards]


def differences(name, kind, precision):
    """Between stages in one engine and each in a new one, that starts from the fp32 weights: (fp32
    weights, the module's own weights), the largest of all stages."""
    one, settings = start(name, kind, precision)
    found = [0.0, 0.0]
    for stage in range(STAGES):
        before, _ = snapshot(one)
        train(one, settings, name, stage)
        masters, shards = snapshot(one)
        new, _ = start(name, kind, precision)
        new.load_weights(before.items())
        train(new, settings, name, stage)
        other_masters, other_shards = snapshot(new)
        new.close()
        moved = max(float((w - before[n]).abs().max()) for n, w in masters.items())
        assert moved > 1e-3
        pairs = [(w, other_masters[n]) for n, w in masters.items()]
        found[0] = max(found[0], *(float((a - b).abs().max()) for a, b in pairs))
        both = zip(shards, other_shards, strict=True)
        found[1] = max(found[1], *(float((a - b).float().abs().max()) for a, b in both))
    one.close()
    return tuple(found)


def all_differences():
    cases = itertools.product(MODELS, BUILDS, ("fp32", "bf16"))
    names = list(MODELS)
    return {
        (kind, precision): differences(name, kind, precision)
        for name, kind, precision in cases
        # One model for each engine and precision; RUN_EVERYTHING=1 takes the whole product.
        if EVERYTHING or names.index(name) == (list(BUILDS).index(kind) + (precision == "bf16")) % 4
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_stages_in_one_engine_are_stages_each_in_a_new_one(ranks):
    for results in run_ranks(all_differences, ranks):
        assert {kind for kind, _ in results} == set(BUILDS)
        for case, (masters, weights) in results.items():
            assert masters == 0.0, case
            assert weights == 0.0, case


# Three ways to keep the fp32 weights.
ENGINES_OF_A_RUN = ["zero1", "zero3", "fsdp", *(["zero0", "zero2"] if EVERYTHING else [])]


class Interrupted(Exception):
    pass


def run(path: Path, runs: Path, name: str, kind: str, settings: list[str], stop: int | None = None):
    """A run of two stages; with `stop` it breaks off where that stage is published, and continues.

    Returns per stage (fp32 weights, how many random numbers the measuring drew).
    """
    loaded = load_recipe(
        path, [f"name={name}", "stages[0].steps=3", "stages[1].steps=3", *settings]
    )
    if kind == "fsdp":
        loaded.engine.kind = "fsdp"
        config = resolve_engine_config(None, loaded, world_size(), "cpu")
    else:
        zero = {"zero_optimization": ENGINES[kind]}
        config = resolve_ds_config(zero, loaded, world_size(), "cpu")
    engines, found = set(), {}

    def measure(engine, separation, task, asked):
        nonlocal stop
        if task.stage == stop:
            stop = None
            raise Interrupted
        before = torch.get_rng_state()
        measure_in_engine(engine, separation, task, asked)
        assert torch.equal(before, torch.get_rng_state())
        assert engine.module.training
        engines.add(id(engine))
        found[task.stage] = {n: w.clone() for n, w in engine.full_weights()}

    def go():
        run_recipe(loaded, config, runs, measure, pytest.fail, lambda folder: folder)

    if stop is not None:
        with suppress(Interrupted):
            go()
        engines.clear()
    go()
    assert len(engines) == 1  # for all that was left to do
    return found


def losses(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "sequences.npz") as arrays:
        return dict(arrays)


def interrupted_and_not(path, runs):
    out = {}
    halved = ["train.precision=bf16", "train.publish_dtype=bfloat16"]
    for kind in ENGINES_OF_A_RUN:
        whole = run(path, runs / "whole", f"whole {kind}", kind, halved)
        broken = run(path, runs / "broken", f"broken {kind}", kind, halved, stop=1)
        same = {s: all(torch.equal(w, whole[s][n]) for n, w in broken[s].items()) for s in broken}
        rounded = all(torch.equal(w, w.bfloat16().float()) for w in whole[1].values())
        out[kind] = same, rounded
    return out


def test_an_interrupted_run_is_the_uninterrupted_one(recipe, tmp_path):  # noqa: F811
    """In bf16 and published in bf16: what continues is fp32."""
    for results in run_ranks(interrupted_and_not, 2, recipe, tmp_path):
        for kind, (same, rounded) in results.items():
            assert same == {0: True, 1: True, 2: True}, kind
            assert not rounded, kind
    for kind in ENGINES_OF_A_RUN:
        whole, broken = (tmp_path / w / f"{w} {kind}" / "stages" for w in ("whole", "broken"))
        for stage in ("00_base", "01_a", "02_b"):
            a, b = losses(whole / stage), losses(broken / stage)
            assert all(np.array_equal(a[n], b[n]) for n in a), (kind, stage)
        assert not list(whole.glob("*/masters")), kind  # nothing is left to continue from it


def measured_twice(path, runs):
    """(largest difference of a sequence's loss) in the engine and from the published checkpoint."""
    worst = {}
    for kind in ("zero3", "fsdp"):
        name = f"{kind} on {world_size()}"
        settings = ["train.precision=fp32", "evaluate.batch_size=3", "mask.from_stage=2"]
        run(path, runs, name, kind, settings)
        for stage in (runs / name / "stages").iterdir():
            part = stage / f"again-{rank()}.npz"
            net = load_for_evaluation(stage / "checkpoint", "masked", "sdpa")
            evaluate_share(net, runs / name / "heldout", part, overlap=False)
            with np.load(part) as again:
                here = losses(stage)
                worst[name, stage.name] = max(float(abs(here[n] - again[n]).max()) for n in again)
                assert all(again[n].min() > 0 for n in again)
    return worst


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_measures_what_the_published_checkpoint_has(ranks, recipe, tmp_path):  # noqa: F811
    for worst in run_ranks(measured_twice, ranks, recipe, tmp_path):
        assert len(worst) == 6
        for case, difference in worst.items():
            assert difference < 2e-5, case  # of a sum over 5 tokens or so, each of about 6 nats
    for log in tmp_path.glob("*/log.jsonl"):  # `from_stage: 2`: the first one is dense
        steps = [r for r in map(json.loads, log.open(encoding="utf-8")) if r["event"] == "step"]
        assert {(r["stage"], r["kept"] < 0.5) for r in steps} == {(1, False), (2, True)}


class Overflowing:
    """An engine under fp16: what the loss scaler finds not finite, it skips."""

    scales_loss = True

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self, lr, hold):
        grads = [p.grad for p in self._engine.module.parameters()]
        if all(bool(g.isfinite().all()) for g in grads):
            return self._engine.step(lr, hold)
        self._engine.module.zero_grad()
        return False


class Log(list):
    def write(self, event, **values):
        self.append(values)


def skips_an_overflow():
    """(applied, kept) of each step; the gradient of the second one overflows."""
    settings = recipe_for("roberta", 2)
    settings.mask.criterion = "gradient"
    engine = zero_engine(MODELS["roberta"]().train(), settings, ENGINES["zero0"])
    mask = GradientMask(engine.module, settings.mask, 0)
    weight = engine.module.roberta.encoder.layer[0].output.dense.weight
    seen = itertools.count(1)
    weight.register_hook(lambda g: g * torch.inf if next(seen) == 2 else g)
    log = Log()
    batches = iter(micro_batches("roberta", 3, 1))
    train_stage(Overflowing(engine), mask, batches, settings, 1, 3, log)
    return [(step["applied"], round(step["kept"], 1)) for step in log]


def test_an_overflow_under_the_gradient_criterion_is_skipped_by_the_scaler():
    assert run_ranks(skips_an_overflow, 1) == [[(True, 0.3), (False, 0.0), (True, 0.3)]]


def bytes_of_tensors():
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def left_by_engines():
    """Bytes that are left of an engine that trained for a stage and was closed."""
    out = {}
    for kind in BUILDS:
        before = bytes_of_tensors()
        engine, settings = start("llama", kind, "bf16")
        engine.start_stage()
        for _ in range(2):  # DeepSpeed's hooks are other ones once it has seen a step
            train(engine, settings, "llama", 0)
        for _ in range(2):  # a teacher a stage
            frozen = engine.frozen(MODELS["llama"]())
            assert frozen(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()
            rotary = [b.dtype for n, b in frozen.named_buffers() if "inv_freq" in n]
            assert set(rotary) == {torch.float32}, kind  # as in the model that is trained
            engine.release(frozen)
            del frozen
        train(engine, settings, "llama", 0)
        engine.close()
        del engine
        out[kind] = bytes_of_tensors() - before
    return out


def test_a_closed_engine_leaves_nothing():
    [left] = run_ranks(left_by_engines, 1)
    weights = 4 * sum(p.numel() for p in MODELS["llama"]().parameters())
    assert {kind: size for kind, size in left.items() if size > 0.05 * weights} == {}
