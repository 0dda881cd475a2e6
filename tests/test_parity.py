"""Every engine and every split of the batch gives the masks and weights of the reference."""

import itertools
import os

import pytest
import torch

from pipeline.engine.config import resolve_ds_config
from pipeline.engine.zero import ZeroEngine
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import rank, world_size
from pipeline.recipe import Data, Domain, Mask, Model, Optimizer, Recipe, Stage, Train
from pipeline.run.train import train_stage
from tests.reference import (
    BETAS,
    CAUSAL,
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
EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))


def recipe_for(name: str, batch_size: int) -> Recipe:
    return Recipe(
        name="parity",
        model=Model(path="unused", objective="causal" if name in CAUSAL else "masked"),
        data=Data(domains={"x": Domain(embedded="prose")}, sequence_length=12),
        stages=[Stage("x", steps=STEPS)],
        mask=Mask(threshold=THRESHOLD),
        optimizer=Optimizer(
            lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, schedule="constant"
        ),
        train=Train(batch_size=batch_size, micro_batch_size=2, gradient_clipping=CLIP),
    )


class History(GradientMask):
    """A mask that remembers its selections."""

    def apply(self, engine, step):
        kept = super().apply(engine, step)
        self.history = [*getattr(self, "history", []), self.rows_by_name(self.keep.clone())]
        return kept


def zero_engine(model, recipe, zero_optimization):
    config = {"zero_optimization": zero_optimization}
    return ZeroEngine(
        model, resolve_ds_config(config, recipe, world_size(), "cpu"), recipe.optimizer
    )


def train(
    name, engine, steps, accumulation, precision="fp32", checkpoint=False,
    weight_decay=WEIGHT_DECAY, update="gradient", build=zero_engine,
):  # fmt: skip
    """Train on this rank's share of `steps`; returns (weights, kept rows per step)."""
    recipe = recipe_for(name, 2 * world_size() * accumulation)
    recipe.train.precision = precision
    recipe.optimizer.weight_decay = weight_decay
    recipe.mask.update = update
    model = MODELS[name]().train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return train_shares(build(model, recipe, engine), recipe, steps)


def train_shares(sharded, recipe, steps):
    """Train this rank's share of `steps` and close; returns (weights, kept rows per step)."""
    mask = History(sharded.module, recipe.mask, seed=0)
    mine = iter([step[rank() :: world_size()] for step in steps])
    train_stage(sharded, mask, mine, recipe, 1, len(steps), log=None)
    weights = dict(sharded.full_weights())
    history = [{n: k for n, (k, _) in step.items()} for step in mask.history]
    mask.close()
    sharded.close()
    return weights, history


def compare(name, engine, accumulation, checkpoint=False, update="gradient", build=zero_engine):
    """(rows selected otherwise, largest weight difference) against the reference."""
    steps = micro_batches(name, STEPS, world_size() * accumulation)
    expected, kept = train_reference(name, steps, strict=update == "strict")
    weights, history = train(
        name, engine, steps, accumulation, checkpoint=checkpoint, update=update, build=build
    )
    flips = sum(
        int((rows != masks[n.removesuffix(".weight")]).sum())
        for masks, found in zip(kept, history, strict=True)
        for n, rows in found.items()
    )
    assert len(history[0]) == len(kept[0])
    return flips, max(float((weights[n] - w).abs().max()) for n, w in expected.items())


def changed_rows(name, engine, update):
    """Train in bf16; how many layers have changed in other rows than those that were kept.

    One step of masked gradients without weight decay; or, strict, three with weight decay and the
    momentum of earlier steps: a row that was never kept must have the bits it began with.
    """
    strict = update == "strict"
    steps = micro_batches(name, 3 if strict else 1, world_size())
    before = MODELS[name]().bfloat16().state_dict()
    weights, history = train(
        name, engine, steps, 1, precision="bf16", weight_decay=0.1 if strict else 0.0, update=update
    )
    kept = {n: torch.stack([step[n] for step in history]).any(0) for n in history[0]}
    dim = 0 if name == "gpt2" else 1  # the inputs: GPT-2's weights are [in, out]
    changed = {n: (weights[n] != before[n].float()).any(dim) for n in kept}
    return sum(not torch.equal(rows, changed[n]) for n, rows in kept.items())


def compare_all():
    out = {}
    for i, name in enumerate(MODELS):
        for j, engine in enumerate(ENGINES):
            # One of the four pairs for each model and engine: over them, each engine and each
            # model sees both values of both. RUN_EVERYTHING=1 takes the whole product.
            pairs = list(itertools.product((1, 3), ("gradient", "strict")))
            for accumulation, update in pairs if EVERYTHING else [pairs[(i + j) % 4]]:
                key = f"{name}, {engine}, accumulation {accumulation}, {update}"
                out[key] = compare(name, ENGINES[engine], accumulation, update=update)
    for j, engine in enumerate(ENGINES):
        for i, name in enumerate(MODELS):
            for update in ("gradient", "strict"):
                if EVERYTHING or (i, update) == (j % 4, ("gradient", "strict")[j // 2 % 2]):
                    key = f"{name}, {engine}, bf16, {update}"
                    out[key] = changed_rows(name, ENGINES[engine], update), 0.0
    out["checkpointing"] = compare("roberta", ENGINES["zero2"], 3, checkpoint=True)
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_engine_equals_the_reference(ranks):
    for results in run_ranks(compare_all, ranks):
        for case, (flips, difference) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case


def compare_eight():
    return compare("roberta", ENGINES["zero2"], 8 // world_size())


def test_eight_micro_batches_give_the_same_however_they_are_split():
    """1 x 8 = 2 x 4 = 8 x 1 of ranks x accumulation: each equals the one reference."""
    for ranks in (1, 2, 8):
        for flips, difference in run_ranks(compare_eight, ranks):
            assert flips == 0
            assert difference < 1e-6
