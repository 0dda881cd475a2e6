"""One engine for all stages: it forgets the optimizer between them, and nothing else."""

import itertools

import pytest

from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import rank, world_size
from pipeline.run.train import train_stage
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, EVERYTHING, recipe_for, zero_engine

STAGES = 3
BUILDS = {name: (zero_engine, settings) for name, settings in ENGINES.items()}
BUILDS["fsdp"] = (fsdp_engine, {})
# The weights that are not gathered again before each use are another path through ZeRO-3.
BUILDS["zero3 persistent"] = (zero_engine, {"stage": 3})


def start(name, kind, precision):
    """(engine, recipe); the engine has the weights of the model's file, in fp32."""
    build, settings = BUILDS[kind]
    recipe = recipe_for(name, 2 * world_size())
    recipe.train.precision = precision
    model = MODELS[name]().train()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = build(model, recipe, settings)
    engine.load_weights(weights.items())
    return engine, recipe


def train(engine, recipe, name, stage):
    mask = GradientMask(engine.module, recipe.mask, seed=stage)
    steps = micro_batches(name, 2 * STAGES, world_size())[2 * stage : 2 * stage + 2]
    train_stage(engine, mask, iter([s[rank() :: world_size()] for s in steps]), recipe, 1, 2, None)
    mask.close()


def snapshot(engine):
    """(fp32 weights, the module's own shards), copied."""
    masters = {n: w.clone() for n, w in engine.full_weights()}
    shards = engine.shards.weight_shards(list(masters))
    return masters, [s.tensor.clone() for s in shards]


def differences(name, kind, precision):
    """Between stages in one engine and each in a new one, that starts from the fp32 weights: (fp32
    weights, the module's own weights), the largest of all stages."""
    one, recipe = start(name, kind, precision)
    found = [0.0, 0.0]
    for stage in range(STAGES):
        before, _ = snapshot(one)
        one.start_stage()
        train(one, recipe, name, stage)
        masters, shards = snapshot(one)
        new, _ = start(name, kind, precision)
        new.load_weights(before.items())
        train(new, recipe, name, stage)
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
