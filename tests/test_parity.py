"""Every engine and every split of the batch gives the masks and weights of the reference."""

import itertools
import os
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch

from pipeline.data.mlm import collate
from pipeline.engine import optimizer
from pipeline.engine.config import resolve_ds_config
from pipeline.engine.zero import ZeroEngine
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.attention import separate_documents
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
    "zero2": {"stage": 2, "reduce_bucket_size": 300},  # several weights in one, and one in none
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

    def apply(self, engine, step, edited=False):
        kept = super().apply(engine, step, edited)
        self.history = [*getattr(self, "history", []), self.rows_by_name(self.keep.clone())]
        return kept


def zero_engine(model, recipe, zero_optimization, **more):
    config = {"zero_optimization": zero_optimization, **more}
    return ZeroEngine(
        model, resolve_ds_config(config, recipe, world_size(), "cpu"), recipe.optimizer
    )


def train(
    name, engine, steps, accumulation, precision="fp32", checkpoint=False,
    weight_decay=WEIGHT_DECAY, update="gradient", build=zero_engine, backward="dense",
):  # fmt: skip
    """Train on this rank's share of `steps`; returns (weights, kept rows per step)."""
    recipe = recipe_for(name, 2 * world_size() * accumulation)
    recipe.train.precision = precision
    recipe.optimizer.weight_decay = weight_decay
    recipe.mask.update, recipe.mask.backward = update, backward
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


def compare(
    name, engine, accumulation, checkpoint=False, update="gradient", build=zero_engine,
    backward="dense", count=STEPS,
):  # fmt: skip
    """(rows selected otherwise, largest weight difference) against the reference."""
    steps = micro_batches(name, count, world_size() * accumulation)
    expected, kept = train_reference(name, steps, strict=update == "strict")
    weights, history = train(
        name, engine, steps, accumulation, checkpoint=checkpoint, update=update, build=build,
        backward=backward,
    )  # fmt: skip
    flips = sum(
        int((rows != masks[n.removesuffix(".weight")]).sum())
        for masks, found in zip(kept, history, strict=True)
        for n, rows in found.items()
    )
    assert len(history[0]) == len(kept[0])
    return flips, max(float((weights[n] - w).abs().max()) for n, w in expected.items())


fp32_sums = partial(zero_engine, data_types={"grad_accum_dtype": "fp32"})


def changed_rows(name, engine, update, accumulation=1, build=zero_engine):
    """Train in bf16; how many layers have changed in other rows than those that were kept.

    One step of masked gradients without weight decay; or, strict, three with weight decay and the
    momentum of earlier steps: a row that was never kept must have the bits it began with.
    """
    strict = update == "strict"
    steps = micro_batches(name, 3 if strict else 1, world_size() * accumulation)
    before = MODELS[name]().bfloat16().state_dict()
    weights, history = train(
        name, engine, steps, accumulation, precision="bf16", update=update, build=build,
        weight_decay=0.1 if strict else 0.0,
    )  # fmt: skip
    kept = {n: torch.stack([step[n] for step in history]).any(0) for n in history[0]}
    dim = 0 if name == "gpt2" else 1  # the inputs: GPT-2's weights are [in, out]
    changed = {n: (weights[n] != before[n].float()).any(dim) for n in kept}
    return sum(not torch.equal(rows, changed[n]) for n, rows in kept.items())


def groups_of(several):
    """AdamW's groups, which ZeRO-1 and 2 update one by one: several of matrices, or one."""
    return patch.object(optimizer, "SMALLEST", 2000 if several else 2**24)


def compare_all():
    out = {}
    for i, name in enumerate(MODELS):
        for j, engine in enumerate(ENGINES):
            # One of the four pairs for each model and engine: over them, each engine and each
            # model sees both values of both. RUN_EVERYTHING=1 takes the whole product.
            pairs = list(itertools.product((1, 3), ("gradient", "strict")))
            for accumulation, update in pairs if EVERYTHING else [pairs[(i + j) % 4]]:
                key = f"{name}, {engine}, accumulation {accumulation}, {update}"
                with groups_of((i // 2 + j) % 2):
                    out[key] = compare(name, ENGINES[engine], accumulation, update=update)
    for j, engine in enumerate(ENGINES):
        for i, name in enumerate(MODELS):
            for update in ("gradient", "strict"):
                if EVERYTHING or (i, update) == (j % 4, ("gradient", "strict")[j // 2 % 2]):
                    key = f"{name}, {engine}, bf16, {update}"
                    out[key] = changed_rows(name, ENGINES[engine], update), 0.0
    for stage, update in ((1, "strict"), (2, "gradient"), (3, "strict")):
        found = changed_rows("llama", ENGINES[f"zero{stage}"], update, 3, fp32_sums)
        out[f"zero{stage}, bf16 with sums in fp32"] = found, 0.0
    out["checkpointing"] = compare("roberta", ENGINES["zero2"], 3, checkpoint=True)
    uncopied = {"stage": 2, "contiguous_gradients": False}
    out["uncopied gradients"] = compare("llama", uncopied, 3, backward="row_sparse")
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_engine_equals_the_reference(ranks):
    for results in run_ranks(compare_all, ranks):
        for case, (flips, difference) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case


def compare_eight():
    masks = [masks_of_unequal_rows(name) for name in ("llama", "t5")]
    return (*compare("roberta", ENGINES["zero2"], 8 // world_size()), masks)


def masks_of_unequal_rows(name):
    """Kept rows of two steps of 8 instruction rows of very unequal lengths, by how each rank splits
    its rows and keeps documents apart."""
    lengths = [(12,), (2, 1), (7, 5), (1,), (12,), (3,), (5, 6), (2,)]
    generator = np.random.default_rng(0)
    steps = []
    for _ in range(2):
        rows = []
        for row in lengths:
            segments = np.full(12, -1)
            segments[: sum(row)] = np.repeat(np.arange(len(row)), row)
            ids = np.where(segments < 0, 0, generator.integers(5, 53, 12))
            first = np.diff(segments, prepend=-1) != 0  # of a document: not predicted
            learnt = (segments >= 0) & ~first & (np.arange(12) % 3 > 0)
            if name == "t5":  # the responses stand last
                learnt = np.zeros(12, bool)
                for end, length in zip(np.cumsum(row), row, strict=True):
                    learnt[end - -(-length // 3) : end] = True
            rows.append((ids, np.where(learnt, ids, -100), segments))
        steps.append(rows)
    found = []
    mine = 8 // world_size()
    for size, way in dict.fromkeys([(mine, "positions"), (1, "positions"), (mine, "rows")]):
        if name == "t5" and way == "rows":
            continue  # it knows one way
        recipe = recipe_for(name, 8)
        recipe.train.micro_batch_size = size
        model = MODELS[name]().train()
        kept_apart = separate_documents(model, True, False, way, 12)
        engine = zero_engine(model, recipe, ENGINES["zero2"])
        mask = History(engine.module, recipe.mask, seed=0)
        own = [step[rank() :: world_size()] for step in steps]
        batches = ([collate(r[i : i + size]) for i in range(0, mine, size)] for r in own)
        train_stage(engine, mask, batches, recipe, 1, 2, log=None, separation=kept_apart)
        found.append([{n: k.tolist() for n, (k, _) in step.items()} for step in mask.history])
        mask.close()
        engine.close()
    return found


def test_eight_micro_batches_give_the_same_however_they_are_split():
    """1 x 8 = 2 x 4 = 8 x 1 of ranks x accumulation: each equals the one reference."""
    unequal: list[list] = [[], []]
    for ranks in (1, 2, 8):
        for flips, difference, masks in run_ranks(compare_eight, ranks):
            assert flips == 0
            assert difference < 1e-6
            for known, more in zip(unequal, masks, strict=True):
                known += more
    for masks in unequal:  # padding in some micro-batches only
        assert all(mask == masks[0] for mask in masks)
