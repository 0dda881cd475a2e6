"""Every engine and every split of the batch gives the masks and weights of the reference."""

import itertools
from dataclasses import replace

import pytest

from pipeline.engine.config import resolve_ds_config
from pipeline.engine.zero import ZeroEngine
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import rank, world_size
from pipeline.recipe import Data, Domain, Mask, Model, Optimizer, Recipe, Stage, Train
from pipeline.train import train_stage
from tests.reference import (
    BETAS,
    CLIP,
    EPS,
    LR,
    MODELS,
    THRESHOLD,
    WEIGHT_DECAY,
    micro_batches,
    train_reference,
)
from tests.spawn import run_ranks

OFFLOAD = {"device": "cpu"}
ENGINES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero1 offload": {"stage": 1, "offload_optimizer": OFFLOAD},
    "zero2 offload": {"stage": 2, "offload_optimizer": OFFLOAD},
    "zero3 offload": {
        "stage": 3,
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
        "stage3_param_persistence_threshold": 0,
    },
}
STEPS = 3


def recipe_for(
    name: str, batch_size: int, micro_batch: int = 2, mask: Mask | None = None
) -> Recipe:
    return Recipe(
        name="parity",
        model=Model(path="unused", objective="causal" if name == "llama" else "masked"),
        data=Data(domains={"x": Domain(embedded="prose")}, sequence_length=12),
        stages=[Stage("x", steps=STEPS)],
        mask=mask or Mask(threshold=THRESHOLD),
        optimizer=Optimizer(
            lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, schedule="constant"
        ),
        train=Train(batch_size=batch_size, micro_batch_size=micro_batch, gradient_clipping=CLIP),
    )


class History(GradientMask):
    """A mask that remembers its selections."""

    def apply(self, engine, step):
        kept = super().apply(engine, step)
        self.history = [*getattr(self, "history", []), self.rows_by_name(self.keep.clone())]
        return kept


def train(
    name, engine, steps, accumulation, mask_settings=None, precision="fp32", checkpoint=False
):
    """Train on this rank's share of `steps`; returns (weights, kept rows per step)."""
    recipe = recipe_for(name, 2 * world_size() * accumulation, mask=mask_settings)
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    config = resolve_ds_config({"zero_optimization": engine}, recipe, world_size(), "cpu")
    model = MODELS[name]().train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    deepspeed = ZeroEngine(model, config, recipe.optimizer)
    mask = History(deepspeed.module, recipe.mask, seed=0)
    mine = iter([step[rank() :: world_size()] for step in steps])
    train_stage(deepspeed, mask, mine, recipe, 1, len(steps), log=None)
    weights = dict(deepspeed.full_weights())
    history = [{n: k for n, (k, _) in step.items()} for step in mask.history]
    mask.close()
    deepspeed.close()
    return weights, history


def compare(name, engine, accumulation, checkpoint=False):
    """(rows selected otherwise, largest weight difference) against the reference."""
    steps = micro_batches(name, STEPS, world_size() * accumulation)
    expected, kept = train_reference(name, steps)
    weights, history = train(name, engine, steps, accumulation, checkpoint=checkpoint)
    flips = sum(
        int((rows != masks[n.removesuffix(".weight")]).sum())
        for masks, found in zip(kept, history, strict=True)
        for n, rows in found.items()
    )
    assert len(history[0]) == len(kept[0])
    return flips, max(float((weights[n] - w).abs().max()) for n, w in expected.items())


def compare_all():
    out = {}
    for name, engine, accumulation in itertools.product(MODELS, ENGINES, (1, 3)):
        key = f"{name}, {engine}, accumulation {accumulation}"
        out[key] = compare(name, ENGINES[engine], accumulation)
    out["checkpointing"] = compare("roberta", ENGINES["zero2"], 3, checkpoint=True)
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_engine_equals_the_reference(ranks):
    for results in run_ranks(compare_all, ranks):
        for case, (flips, difference) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case
