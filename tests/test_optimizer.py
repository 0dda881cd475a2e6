"""AdamW's groups, and its 8-bit moments (bitsandbytes) under the mask."""

import math

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from pipeline.engine.config import memory_per_rank, resolve_ds_config
from pipeline.engine.optimizer import weight_groups
from pipeline.errors import UserError
from pipeline.recipe import Optimizer
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import learning_rate, train_stage
from tests.reference import micro_batches
from tests.spawn import run_ranks
from tests.test_parity import ENGINES, History, recipe_for, zero_engine


def small_roberta() -> RobertaForMaskedLM:
    """Large enough that bitsandbytes keeps 8-bit moments of its matrices: from 4096 elements."""
    torch.manual_seed(0)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=53,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=20,
            type_vocab_size=1,
        )
    )


def test_learning_rates_are_those_of_the_closed_form():
    """Warm-up to the peak, which is reached once, then to 0 behind the last step."""
    steps, peak = 10, 3.0
    for schedule, falls in (
        ("constant", lambda x: 1.0),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ):
        for warmup in (0, 3, 10):
            optimizer = Optimizer(schedule=schedule, warmup=warmup / steps)
            found = [learning_rate(optimizer, peak, i, steps) for i in range(1, steps + 1)]
            rising = [peak * i / warmup for i in range(1, warmup + 1)]
            behind = [peak * falls(i / (steps - warmup)) for i in range(steps - warmup)]
            assert found == pytest.approx(rising + behind), (schedule, warmup)
    # As written: the product of the floats 0.07 and 100 is just above 7.
    assert learning_rate(Optimizer(warmup=0.07), peak, 7, 100) == peak


@pytest.mark.parametrize("largest", [None, 1, 5000, 10**6])
def test_groups_have_every_weight_once_and_no_more_than_the_largest(largest):
    model = small_roberta()
    groups = weight_groups(model, 0.1, largest)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    for decay, parameters in ((0.1, matrices), (0.0, vectors)):
        parts = [g["params"] for g in groups if g["weight_decay"] == decay]
        assert [id(p) for part in parts for p in part] == [id(p) for p in parameters]
        if largest is None:
            assert len(parts) == 1
        else:
            assert all(len(p) == 1 or sum(w.numel() for w in p) <= largest for p in parts)


def two_strict_steps(engine, precision):
    """Returns (layers, layers whose changed rows are not those kept in either step, dtypes of the
    moments of large tensors)."""
    settings = recipe_for("roberta", 2)
    settings.optimizer.name = "adamw8bit"
    settings.mask.update = "strict"
    settings.train.precision = precision
    model = small_roberta().train()
    if precision == "bf16":
        model.bfloat16().float()  # what the fp32 master weights begin with
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sharded = zero_engine(model, settings, ENGINES[engine])
    mask = History(sharded.module, settings.mask, seed=0)
    train_stage(sharded, mask, iter(micro_batches("roberta", 2, 1)), settings, 1, 2, log=None)
    weights = dict(sharded.full_weights())
    kept = {n: mask.history[0][n][0] | mask.history[1][n][0] for n in mask.history[0]}
    wrong = [n for n, k in kept.items() if not torch.equal((weights[n] != before[n]).any(1), k)]
    state = sharded._engine.basic_optimizer.state
    large = [s["state1"].dtype for p, s in state.items() if p.numel() >= 4096]
    mask.close()
    sharded.close()
    return len(kept), wrong, set(large)


def every_engine():
    out = {engine: two_strict_steps(engine, "fp32") for engine in ENGINES}
    return out | {f"{e}, bf16": two_strict_steps(e, "bf16") for e in ("zero0", "zero1", "zero2")}


def test_rows_never_kept_stay_and_the_moments_have_8_bits():
    [results] = run_ranks(every_engine, 1)
    for case, (layers, wrong, dtypes) in results.items():
        assert layers == 12, case
        assert not wrong, case
        assert dtypes == {torch.uint8}, case


def test_the_configuration_follows_the_recipe():
    eight_bit = ["optimizer.name=adamw8bit", "mask.update=strict"]
    recipe = load_recipe("demo", eight_bit)
    zero2 = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
    config = resolve_ds_config(zero2, recipe, 1, "cuda")
    assert config["zero_allow_untested_optimizer"]
    assert not config["zero_force_ds_cpu_optimizer"]
    with pytest.raises(UserError, match="zero_allow_untested_optimizer: takes no effect here"):
        resolve_ds_config(zero2 | {"zero_allow_untested_optimizer": False}, recipe, 1, "cpu")
    with pytest.raises(UserError, match=r'optimizer.type: only "AdamW"'):
        resolve_ds_config({"optimizer": {"type": "AdamW8bit"}}, recipe, 1, "cpu")
    with pytest.raises(UserError, match=r"adamw8bit does not step FSDP"):
        load_recipe("demo", [*eight_bit, "engine.kind=fsdp"])
    with pytest.raises(UserError, match=r"masked rows would drift; set mask.update=strict"):
        load_recipe("demo", eight_bit[:1])
    load_recipe("demo", [eight_bit[0], "mask.enabled=false"])
    assert sum(memory_per_rank(100, config, 1, "adamw8bit")["optimizer"]) == 200


def test_plain_adamw_is_the_default():
    config = resolve_ds_config({"zero_optimization": {"stage": 2}}, load_recipe("demo"), 1, "cpu")
    assert "zero_allow_untested_optimizer" not in config
