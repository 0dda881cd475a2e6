"""What is not finite on one rank stops training on every rank, with the weights as they were."""

import re
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch

from pipeline.errors import TrainingStopped
from pipeline.migu import gradient_mask
from pipeline.migu.gradient_mask import GradientMask
from pipeline.migu.mask import select_rows
from pipeline.ranks import rank
from pipeline.run.train import train_stage
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, recipe_for, zero_engine

LAYER = "roberta.encoder.layer.1.intermediate.dense.weight"
STEP = r"stage 1 \(x\), step 1: the loss is "
MESSAGES = {
    "weight": rf"{STEP}nan, non-finite output magnitude in {LAYER}",
    "loss": rf"{STEP}inf",
    "rows": r"the mask: the ranks have selected other rows of \S+attention\.self\.query\.weight",
    "gradient": rf"{STEP}[\d.]+, the gradient's norm is (nan|inf)",
}


def spoil_weight(engine):
    for shard in engine.shards.weight_shards([LAYER]):
        shard.tensor[-1] = torch.nan


def spoil_loss(engine):
    """Every logit but the first is -inf: no target has a probability. The masked layers' outputs
    are finite."""

    def hook(module, inputs, output):
        output.logits = output.logits.index_fill(-1, torch.arange(1, 53), -torch.inf)
        return output

    engine.module.register_forward_hook(hook)


def spoil_gradient(engine):
    """Of the embeddings, which are not masked; the loss is finite."""

    def hook(module, inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    engine.module.roberta.embeddings.register_forward_hook(hook)


@contextmanager
def other_rows():
    """This rank selects another row of the first layer."""

    def select(*arguments):
        keep = select_rows(*arguments)
        keep[0] = ~keep[0]
        return keep

    with patch.object(gradient_mask, "select_rows", select):
        yield


SPOIL = {"weight": spoil_weight, "loss": spoil_loss, "gradient": spoil_gradient}


def stop(case, build, settings, precision):
    """Spoil the last rank; returns (message or None, whether the weights are as they were)."""
    recipe = recipe_for("roberta", 4)
    recipe.train.precision = precision
    engine = build(MODELS["roberta"]().train(), recipe, settings)
    mask = GradientMask(engine.module, recipe.mask, seed=0)
    if rank() == 1 and case in SPOIL:
        SPOIL[case](engine)
    before = {n: w.clone() for n, w in engine.full_weights()}
    mine = iter([step[rank() :: 2] for step in micro_batches("roberta", 2, 2)])
    message = None
    try:
        train_stage(engine, mask, mine, recipe, 1, 2, log=None)
    except TrainingStopped as error:
        message = str(error)
    same = all(torch.equal(w.nan_to_num(), before[n].nan_to_num())
               for n, w in engine.full_weights())  # fmt: skip
    mask.close()
    engine.close()
    return message, same


def stop_all():
    engines = {name: (zero_engine, ENGINES[name]) for name in ("zero0", "zero2", "zero3")}
    engines["fsdp"] = (fsdp_engine, {})
    out = {}
    with other_rows() if rank() == 1 else nullcontext():
        for name in ("zero2", "fsdp"):
            out[name, "rows", "fp32"] = stop("rows", *engines[name], "fp32")
    for name, (build, settings) in engines.items():
        for case in SPOIL:
            out[name, case, "fp32"] = stop(case, build, settings, "fp32")
    for name in ("zero0", "zero1", "zero2"):  # bf16: other code in DeepSpeed
        out[name, "gradient", "bf16"] = stop("gradient", zero_engine, ENGINES[name], "bf16")
    return out


@pytest.fixture(scope="module")
def stopped():
    return run_ranks(stop_all, 2)


@pytest.mark.parametrize("case", MESSAGES)
def test_one_rank_stops_every_rank_before_the_step(stopped, case):
    for results in stopped:
        for key, (message, same) in results.items():
            if key[1] == case:
                assert re.fullmatch(MESSAGES[case], str(message)), (key, message)
                assert same, key
