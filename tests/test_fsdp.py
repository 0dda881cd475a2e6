"""The FSDP2 engine gives the masks and weights of the reference, like the others."""

import itertools

import pytest
import torch

from pipeline.engine.config import resolve_engine_config, resolve_fsdp_config
from pipeline.engine.fsdp import FsdpEngine
from pipeline.errors import TrainingStopped, UserError
from pipeline.ranks import rank, world_size
from pipeline.recipe import Engine
from pipeline.run.recipe_file import load_recipe
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_parity import compare, recipe_for, train


def fsdp_engine(model, recipe, settings):
    recipe.engine = Engine("fsdp", **settings)
    return FsdpEngine(model, resolve_fsdp_config(recipe, world_size(), "cpu"), recipe.optimizer)


def changed_rows(name):
    """One bf16 step without weight decay: layers whose changed fp32 rows are not the kept ones."""
    steps = micro_batches(name, 1, world_size())
    before = MODELS[name]().state_dict()
    weights, [kept] = train(
        name, {}, steps, 1, precision="bf16", weight_decay=0.0, build=fsdp_engine
    )
    dim = 0 if name == "gpt2" else 1  # the inputs: GPT-2's weights are [in, out]
    changed = {n: (weights[n] != before[n]).any(dim) for n in kept}
    return sum(not torch.equal(rows, changed[n]) for n, rows in kept.items())


def compare_all():
    """Both accumulations; that with `update: strict` alternates."""
    cases = [*itertools.product(("roberta", "llama"), (1, 3)), ("t5", 3), ("gpt2", 3)]
    out = {}
    for i, (name, accumulation) in enumerate(cases):
        update = "strict" if i in (0, 3, 4) else "gradient"
        out[f"{name}, accumulation {accumulation}, {update}"] = compare(
            name, {}, accumulation, update=update, build=fsdp_engine
        )
    if world_size() == 2:
        out["checkpointing"] = compare("roberta", {}, 3, checkpoint=True, build=fsdp_engine)
        out["not resharded"] = compare(
            "llama", {"reshard_after_forward": False}, 3, build=fsdp_engine
        )
        out |= {f"{name}, bf16": (changed_rows(name), 0.0) for name in MODELS}
    return out


def compare_hsdp():
    return {
        f"{name}, HSDP": compare(name, {"replicas": 2}, accumulation, build=fsdp_engine)
        for name, accumulation in (("roberta", 3), ("llama", 1))
    }


@pytest.mark.parametrize(
    ("cases", "ranks"), [(compare_all, 1), (compare_all, 2), (compare_all, 3), (compare_hsdp, 4)]
)
def test_every_split_equals_the_reference(cases, ranks):
    for results in run_ranks(cases, ranks):
        for case, (flips, difference) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case


def weights_that_are_set_between_forwards():
    """How far a forward in evaluation and one in training are from those of the new weights."""
    engine = fsdp_engine(
        MODELS["llama"](), recipe_for("llama", 6), {"reshard_after_forward": False}
    )
    ids = torch.arange(5, 17)[None]
    found = []
    for scale in (1.5, 0.5):
        with engine.evaluating():
            engine.forward(input_ids=ids)
        engine.load_weights([(n, w * scale) for n, w in MODELS["llama"]().named_parameters()])
        plain = MODELS["llama"]()
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(scale)
            wanted = plain.eval()(input_ids=ids).logits
        with engine.evaluating():
            found.append(engine.forward(input_ids=ids).logits)
        found.append(engine.forward(input_ids=ids).logits)
        found[-2:] = [float((one.detach() - wanted).abs().max()) for one in found[-2:]]
    return found


def test_no_forward_computes_with_what_an_earlier_one_has_gathered():
    [far] = run_ranks(weights_that_are_set_between_forwards, 1)
    assert max(far) < 1e-5


def shards_of_two_rows():
    """(start, size, full shape) of this rank's shards of a weight of two rows."""
    model = MODELS["llama"]()
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(41, 2, bias=False)
    engine = fsdp_engine(model, recipe_for("llama", 6), {})
    name = "model.layers.0.mlp.down_proj.weight"
    return [(s.start, s.tensor.numel(), s.shape) for s in engine.shards.weight_shards([name])]


def overflow():
    """A gradient that is infinite in one shard only: did every rank stop with its old weights?"""
    engine = fsdp_engine(MODELS["roberta"]().train(), recipe_for("roberta", 2 * world_size()), {})
    [batch] = micro_batches("roberta", 1, 1)[0]
    before = dict(engine.full_weights())
    engine.backward(engine.forward(**batch).loss, last=True)
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    for shard in engine.shards.gradient_shards([name]):
        if rank() == world_size() - 1:
            shard.tensor[0] = torch.inf
    try:
        engine.step(1e-3)
    except TrainingStopped:
        return all(torch.equal(w, before[n]) for n, w in engine.full_weights())
    return False


def edges():
    return shards_of_two_rows(), overflow()


def test_a_rank_without_rows_and_a_gradient_that_is_not_finite():
    shards, stopped = zip(*run_ranks(edges, 3), strict=True)
    assert shards == ([(0, 41, (2, 41))], [(41, 41, (2, 41))], [])
    assert stopped == (True, True, True)


@pytest.mark.parametrize(
    ("overrides", "config", "expected"),
    [
        (["engine.replicas=2"], None, "no effect with DeepSpeed"),
        (["engine.reshard_after_forward=false"], None, "no effect with DeepSpeed"),
        (["engine.kind=fsdp", "train.precision=fp16"], None, "needs loss scaling"),
        (["engine.kind=fsdp", "engine.replicas=2"], None, "do not divide 3 rank"),
        (["engine.kind=fsdp"], "ds_configs/zero2.json", "no effect with engine.kind=fsdp"),
        (["engine.kind=fsdp", "train.batch_size=8"], None, "choose train.batch_size a multiple"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(overrides, config, expected):
    with pytest.raises(UserError, match=expected):
        resolve_engine_config(config, load_recipe("demo", overrides), 3, "cpu")
