"""A step whose numbers are bad on one rank is as if it had never been, on every rank and engine,
for the steps that go on with its rows too.
Ranks that should hold the same bits are compared."""

import copy
import os
import re

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import safe_get_full_optimizer_state

from pipeline.errors import TrainingStopped
from pipeline.methods.method import Method
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import rank
from pipeline.recipe import BadSteps, Resume
from pipeline.run.bad_steps import BadStepRule
from pipeline.run.replicas import compare_replicas
from pipeline.run.resume import Attempt
from pipeline.run.stage_state import StageState
from pipeline.run.train import train_stage
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, recipe_for, zero_engine

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
LAYER = "roberta.encoder.layer.1.intermediate.dense"
DOCUMENTS = [{"domain": "a", "document": 7, "token": 0, "begins": "x"}]


class Spoiler:
    """Makes one kind of number bad in this rank's forwards or backwards, while it is on."""

    def __init__(self, module, kind):
        self.on = False
        if kind == "magnitude":
            module.get_submodule(LAYER).register_forward_hook(self.output)
        elif kind == "gradient":  # of the embeddings, which are not masked; the loss is finite
            module.roberta.embeddings.register_forward_hook(self.gradient)
        else:  # the loss is infinite or just too high; the gradient is finite
            module.register_forward_hook(self.loss if kind == "loss" else self.spike)

    def output(self, module, inputs, output):
        return output * torch.nan if self.on else None

    def gradient(self, module, inputs, output):
        if self.on:
            output.register_hook(lambda gradient: gradient * torch.nan)

    def loss(self, module, inputs, output):
        if self.on:
            others = torch.arange(1, output.logits.shape[-1])
            output.logits = output.logits.index_fill(-1, others, -torch.inf)
        return output

    def spike(self, module, inputs, output):
        output.logits = output.logits * 50 if self.on else output.logits
        return output


class Edits(Method):
    """How many steps' gradients a method sees."""

    name = "edits"

    def __init__(self):
        self.count = 0

    def edit(self, shards, step, lr):
        self.count += 1


def trained(build, settings, kind, at, policy="skip", steps=4, **mask_settings):
    """Weights (whole) and moments after training on `steps` batches, of which number `at` (from 0)
    is spoilt on rank 1, or left out of the data (kind None); the message where it stops; how many
    steps a method has seen; the loss scale."""
    recipe = recipe_for("roberta", 4)
    for key, value in mask_settings.items():
        setattr(recipe.mask, key, value)
    recipe.bad_steps = BadSteps(policy, budget=1, spike=6.0 if kind == "spike" else None, window=2)
    engine = build(MODELS["roberta"]().train(), recipe, settings)
    partitioned = settings.get("stage") in (1, 2)
    if partitioned:  # a CPU does not train in fp16, but these scale the loss in fp32 too
        scaler = DynamicLossScaler(2.0**10, 1, 1, 2, False)
        engine._scaler = engine._engine.optimizer.loss_scaler = scaler
    mask = GradientMask(engine.module, recipe.mask, seed=0)
    data = [step[rank() :: 2] for step in micro_batches("roberta", steps, 2)]
    if kind is None:
        data = [batches for i, batches in enumerate(data) if i != at]
    spoiler = Spoiler(engine.module, kind)

    def batches():
        for i, step in enumerate(data):
            spoiler.on = kind is not None and rank() == 1 and i == at
            yield copy.deepcopy(step)

    rule = BadStepRule(recipe.bad_steps, 1, "x", documents=lambda: DOCUMENTS)
    edits = Edits()
    message = None
    try:
        train_stage(
            engine, mask, batches(), recipe, 1, len(data), log=None, bad=rule, methods=[edits]
        )
    except TrainingStopped as error:
        message = str(error)
    weights = {n: w.clone() for n, w in engine.full_weights()}
    moments = [s["exp_avg"].clone() for s in optimizer_of(engine).state.values() if "exp_avg" in s]
    if partitioned and message is None:  # of a first group, of which DeepSpeed keeps views
        weight = engine.module.get_parameter(f"{LAYER}.weight")
        moments.append(safe_get_full_optimizer_state(weight, "exp_avg"))
    scale = engine.loss_scale() if partitioned else {}
    mask.close()
    engine.close()
    return weights, moments, message, edits.count, scale


def optimizer_of(engine):
    return getattr(engine, "_adam", None) or engine._optimizer


def compare_all(everything):
    engines = {
        n: (zero_engine, ENGINES[n]) for n in (ENGINES if everything else ("zero0", "zero2"))
    }
    engines["zero3"] = (zero_engine, ENGINES["zero3"])
    engines["fsdp"] = (fsdp_engine, {})
    kinds = {"zero0": "gradient", "zero2": "loss", "zero3": "magnitude", "fsdp": "spike"}
    masks = {"zero0": {"refresh": 3}, "zero2": {"refresh": 2}, "zero3": {"refresh": 2},
             "fsdp": {"refresh": 3, "backward": "row_sparse"}}  # fmt: skip
    out = {}
    for name, (build, settings) in engines.items():
        for kind in ("magnitude", "loss", "gradient", "spike"):
            if not everything and kinds[name] != kind:
                continue
            at = 2 if kind == "spike" else 0 if kind == "loss" else 1
            # Where the forward has no number, row-sparse backwards do not begin: it stops.
            own = masks[name] if kind != "magnitude" or name != "fsdp" else {"refresh": 3}
            spoilt = trained(build, settings, kind, at, **own)
            without = trained(build, settings, None, at, **own)
            same = all(torch.equal(spoilt[0][n], w) for n, w in without[0].items()) and all(
                torch.equal(a.to_dense(), b.to_dense()) if not hasattr(a, "to_local")
                else torch.equal(a.to_local(), b.to_local())
                for a, b in zip(spoilt[1], without[1], strict=True)
            )  # fmt: skip
            if kind != "gradient":  # whose norm the engine finds behind the edits, in its step
                same = same and spoilt[3:] == without[3:]
            out[name, kind] = same, spoilt[2]
    out["stop"] = trained(zero_engine, ENGINES["zero2"], "magnitude", 1, policy="stop")[2]
    return out


def test_a_bad_step_is_as_if_it_had_never_been():
    for results in run_ranks(compare_all, 2, EVERYTHING):
        stop = results.pop("stop")
        assert results == dict.fromkeys(results, (True, None))
        assert re.fullmatch(
            r"stage 1 \(x\), step 2: the loss is nan, non-finite output magnitude in \S+ "
            r"\(it read documents a 7\)", stop,
        )  # fmt: skip


def test_the_budget_and_the_spike_rule():
    rule = BadStepRule(BadSteps("skip", budget=1, spike=3.0, window=4), 1, "x")
    losses = [2.0, 2.1, 1.9, 2.0]
    for loss in losses:
        assert rule.problem({"loss": loss + 5}) is None  # nothing to compare with yet
        rule.good(loss)
    assert rule.problem({"loss": 2.2}) is None
    assert "is a spike" in rule.problem({"loss": 2.3})
    assert rule.problem({"loss": 2.0, "anchor": float("nan")}) == "the loss of anchor is nan"
    rule.dropped(5, "x")
    again = BadStepRule(BadSteps("skip", budget=1, spike=3.0, window=4), 1, "x")
    again.load_state_dict(rule.state_dict())  # as behind a resume checkpoint
    assert "is a spike" in again.problem({"loss": 2.3})
    with pytest.raises(
        TrainingStopped, match=r"stage 1 \(x\), step 6: y; 1 steps .*bad_steps\.budget"
    ):
        again.dropped(6, "y")


class Listed:
    """Batches of a list, whose place in the data nobody asks for."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def __next__(self):
        return copy.deepcopy(next(self.steps))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        raise AssertionError("the place in the data stays")


def gone_back(folder):
    """Six steps, saved behind the third; the fifth has a loss that is no number. And the three
    first and the sixth alone."""
    weights = []
    for left_out in ((), (3, 4)):
        recipe = recipe_for("roberta", 2)
        recipe.bad_steps = BadSteps("rollback")
        engine = zero_engine(MODELS["roberta"]().train(), recipe, ENGINES["zero2"])
        mask = GradientMask(engine.module, recipe.mask, seed=0)
        data = [s for i, s in enumerate(micro_batches("roberta", 6, 1)) if i not in left_out]
        rule = BadStepRule(recipe.bad_steps, 1, "x")
        state = StageState(engine, Listed(data), mask, [rule])
        attempt = Attempt(folder / str(len(data)), Resume(steps=3, minutes=None), state, 9)
        spoiler = Spoiler(engine.module, "loss")
        rule.go_back = attempt.go_back

        def after_step(step, attempt=attempt, spoiler=spoiler, data=data):
            attempt.after_step(step)
            spoiler.on = len(data) == 6 and step == 4
            return False

        train_stage(engine, mask, state.batches, recipe, 1, len(data), None, after_step, bad=rule)
        attempt.finish()
        weights.append({n: w.clone() for n, w in engine.full_weights()})
        mask.close()
        engine.close()
    return all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())


def test_a_rollback_goes_back_in_the_weights_and_on_in_the_data(tmp_path):
    assert run_ranks(gone_back, 1, tmp_path) == [True]


def flip_all():
    """One bit of one weight flips on rank 1 (of 2: nobody knows who is right), or 2 (of 3)."""
    out = []
    cases = [(zero_engine, ENGINES["zero0"]), (zero_engine, ENGINES["zero2"])]
    for build, settings in cases:
        recipe = recipe_for("roberta", 6)
        engine = build(MODELS["roberta"]().train(), recipe, settings)
        compare_replicas(engine, 1)
        if rank() == 2:
            shard = next(iter(engine.shards.weight_shards([f"{LAYER}.weight"])))
            shard.tensor.view(torch.int32)[11] ^= 1
        try:
            compare_replicas(engine, 2)
            out.append(None)
        except TrainingStopped as error:
            out.append(str(error))
        engine.close()
    return out


def test_a_flipped_bit_is_found_and_its_rank_named():
    for messages in run_ranks(flip_all, 3):
        for message in messages:
            assert re.match(rf"step 2: rank 2 differs in the weight {LAYER}\.weight", message)
