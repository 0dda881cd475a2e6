"""Row-sparse backwards give the masks, gradients and weights of the dense ones."""

import itertools
import os

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.attachment import attach
from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask
from pipeline.migu.row_sparse import RowSparseLinears
from pipeline.migu.targets import Target
from pipeline.model import aligned
from pipeline.model.split_linear import SplitLinear
from pipeline.ranks import world_size
from pipeline.recipe import Mask
from pipeline.shard import ParameterShards
from tests.reference import EPS, MODELS, micro_batches, step_loss
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, compare, recipe_for, train, zero_engine

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_those_of_the_dense_backward_masked(name, dtype, bits):
    """The same rows, and their gradients to rounding: a product of fewer rows may be summed in
    another order. Biases and all."""
    found = []
    for backward in ("dense", "row_sparse"):
        model = MODELS[name]().to(dtype)
        mask = GradientMask(model, Mask(threshold=0.7, backward=backward), 0)
        shards = ParameterShards(model)
        with mask.recording():
            loss = step_loss(name, model, micro_batches(name, 1, 1)[0])
        if mask.defers:
            mask.select(shards, 1)
        loss.backward()
        mask.apply(shards, 1)
        mask.close()
        found.append({n: p.grad for n, p in model.named_parameters()})
    dense, sparse = found
    for n, gradient in dense.items():
        assert torch.equal(gradient != 0, sparse[n] != 0), n
        torch.testing.assert_close(sparse[n], gradient, rtol=bits, atol=bits * 1e-2)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_padded_products_are_those_of_the_kept_rows(kind, monkeypatch):
    """As on a GPU: of the row-sparse linear and of the split one."""
    monkeypatch.setattr(aligned, "pads", lambda _: True)
    linear, output_dim = (nn.Linear(130, 70), 0) if kind is nn.Linear else (Conv1D(70, 130), 1)
    rows = 70
    keep = torch.rand(rows, generator=torch.Generator().manual_seed(0)) < 0.3
    x = torch.randn(5, 130)
    linear(x).square().sum().backward()
    shape = (-1, 1) if output_dim == 0 else (1, -1)
    expected = linear.weight.grad * keep.view(shape)

    model = nn.ModuleDict({"layer": linear})
    model.zero_grad()
    targets = [Target("layer.weight", linear.weight, linear, "ffn_in", rows, output_dim)]
    sparse = RowSparseLinears(model, targets)
    sparse.keep(keep)
    linear(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, expected)
    sparse.close()

    split = SplitLinear(linear, keep)
    split(x).square().sum().backward()
    kept = expected if output_dim == 0 else expected.t()
    torch.testing.assert_close(split.kept.grad, kept[keep])


def compare_engines():
    """By case, rows selected otherwise and the largest weight difference to the reference; under
    ZeRO-3 also the weights that a backward still holds."""
    found = {}
    cases = [*((e, ENGINES[e], zero_engine) for e in ENGINES), ("fsdp", {}, fsdp_engine)]
    names = [n for n in MODELS if n != "t5"]  # its blocks with caches have no checkpointing
    for i, (engine, settings, build) in enumerate(cases):
        every = itertools.product(names, (1, 4), (False, True))
        pair = [(names[i % 3], 4, i % 2 == 0), (names[(i + 1) % 3], 1, i % 2 == 1)]
        for name, accumulation, checkpoint in every if EVERYTHING else pair:
            key = f"{name}, {engine}, accumulation {accumulation}, checkpointing {checkpoint}"
            found[key] = compare(
                name, settings, accumulation, checkpoint=checkpoint, build=build,
                backward="row_sparse", update="strict" if i % 2 else "gradient",
            )  # fmt: skip
    found["zero3, weights held"] = weights_held(), 0.0
    return found


def weights_held():
    """How many weights of the last block are whole when the second backward is at the first."""
    recipe = recipe_for("llama", 2 * world_size())
    engine = zero_engine(MODELS["llama"]().train(), recipe, ENGINES["zero3"])
    engine.start_stage(extra=1)
    first, *_, last = engine.module.model.layers
    held = []

    def count(_gradient):
        held.append(sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in last.parameters()))

    def watch(_module, _inputs, output):
        output.register_hook(count)

    first.register_forward_hook(watch)
    [batches] = micro_batches("llama", 1, 2)
    losses = [engine.forward(input_ids=b["input_ids"]).logits.sum() for b in batches]
    for loss in losses:
        engine.backward(loss, last=loss is losses[-1])
    engine.close()
    return held[1]


def test_every_engine_trains_as_with_the_dense_backward():
    for results in run_ranks(compare_engines, 2):
        for case, (flips, difference) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case


def twenty_steps():
    """By case, rows selected otherwise and the largest weight difference to the dense backward."""
    found = {}
    names = [n for n in MODELS if n != "t5"]
    for i, engine in enumerate((*ENGINES, "fsdp")):
        build = fsdp_engine if engine == "fsdp" else zero_engine
        for accumulation in (1, 4):
            name = names[(i + accumulation) % 3]
            steps = micro_batches(name, 20, world_size() * accumulation)
            (dense, rows), (sparse, others) = (
                train(
                    name, ENGINES.get(engine, {}), steps, accumulation, checkpoint=True,
                    build=build, backward=backward,
                )
                for backward in ("dense", "row_sparse")
            )  # fmt: skip
            flips = sum(
                int((kept != step[n]).sum())
                for known, step in zip(rows, others, strict=True)
                for n, kept in known.items()
            )
            difference = max(float((sparse[n] - w).abs().max()) for n, w in dense.items())
            found[name, engine, accumulation] = flips, difference
    return found


@pytest.mark.skipif(not EVERYTHING, reason="three steps of the same are above")
def test_twenty_steps_are_those_of_the_dense_backward():
    for results in run_ranks(twenty_steps, 2):
        for case, (flips, difference) in results.items():
            print(case, flips, difference)
            assert flips == 0, case
            assert difference < 1e-6, case


def selections(settings, data, dropped=()):
    """Per step: the rows of the gradient, the rows that magnitudes of this step alone select.
    dropped: numbers of steps (from 1) that are not taken, and that the result does not have."""
    model = MODELS["llama"]()
    mask, own = GradientMask(model, settings, 0), GradientMask(model, Mask(), 0)
    shards = ParameterShards(model)
    found = []
    for step, batches in enumerate(data, start=1):
        with mask.recording(), own.recording():
            loss = step_loss("llama", model, batches)
        if mask.defers:
            mask.select(shards, step)
        loss.backward()
        mask.apply(shards, step)
        rows = [(model.get_parameter(t.name).grad != 0).any(1) for t in mask.targets]
        own.select(shards, step)
        assert torch.equal(torch.cat(rows), mask.keep)
        if step in dropped:
            mask.forget(step)
        else:
            found.append((mask.keep.clone(), own.keep.clone()))
            torch.optim.SGD(model.parameters(), 0.5).step()
        model.zero_grad()
    return found


@pytest.mark.parametrize("backward", ["dense", "row_sparse", "previous"])
@pytest.mark.parametrize("refresh", [1, 2])
def test_which_step_selects_the_rows_of_a_step(backward, refresh):
    found = selections(Mask(refresh=refresh, backward=backward), micro_batches("llama", 5, 1))
    assert not torch.equal(found[0][1], found[2][1])  # or it would show nothing
    for i, (rows, _) in enumerate(found):
        chosen = i - i % refresh  # the last step that selected
        if backward == "previous":
            chosen = max(chosen - refresh if i % refresh == 0 else chosen, 0)
        assert torch.equal(rows, found[chosen][1]), i


@pytest.mark.parametrize("dropped", [1, 2, 3])
@pytest.mark.parametrize("backward", ["dense", "row_sparse", "previous"])
@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_a_dropped_step_leaves_its_rows_to_none(backward, refresh, dropped):
    settings = Mask(refresh=refresh, backward=backward)
    data = micro_batches("llama", 6, 1)
    without = [step for i, step in enumerate(data, start=1) if i != dropped]
    spoilt, expected = selections(settings, data, [dropped]), selections(settings, without)
    for found, there in zip(spoilt, expected, strict=True):
        assert all(map(torch.equal, found, there))


def attached_weights(backward, drop=False):
    torch.manual_seed(0)
    model = MODELS["roberta"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    attached = attach(model, optimizer, backward=backward)
    for step, batches in enumerate(micro_batches("roberta", 4, 1)):
        step_loss("roberta", model, batches).backward()
        if not (drop and step == 1):
            optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    attached.detach()
    step_loss("roberta", model, batches).backward()
    assert all(p.grad.ne(0).any(1).all() for n, p in model.named_parameters() if "dense.w" in n)
    return model.state_dict()


@pytest.mark.parametrize("drop", [False, True])
def test_in_another_loop_it_is_the_same(drop):
    """A dropped step, whose gradients are zeroed in place, does not leave its rows to the next."""
    dense, sparse = (attached_weights(b, drop) for b in ("dense", "row_sparse"))
    for name, weight in dense.items():
        torch.testing.assert_close(sparse[name], weight, rtol=1e-5, atol=1e-6)


def test_a_second_backward_in_a_step_is_refused_where_rows_are_selected_by_the_first():
    model = MODELS["roberta"]()
    attach(model, torch.optim.AdamW(model.parameters()), backward="row_sparse")
    [batches] = micro_batches("roberta", 1, 2)
    step_loss("roberta", model, batches[:1]).backward()
    with pytest.raises(UserError, match="one backward a step"):
        step_loss("roberta", model, batches[1:]).backward()


class Elsewhere(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_cannot_be_row_sparse_is_refused_by_name():
    model = MODELS["llama"]()
    model.model.layers[0].mlp.up_proj.__class__ = Elsewhere
    with pytest.raises(UserError, match=r"up_proj\.weight belongs to a Elsewhere"):
        GradientMask(model, Mask(backward="row_sparse"), 0)
    model = MODELS["llama"]()
    model.beside = torch.nn.Linear(1, 1)
    model.beside.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"is tied to a weight of beside"):
        GradientMask(model, Mask(backward="row_sparse"), 0)
    model = MODELS["llama"]()
    mask, shards = GradientMask(model, Mask(backward="row_sparse"), 0), ParameterShards(model)
    with mask.recording():
        loss = step_loss("llama", model, micro_batches("llama", 1, 1)[0])
    mask.select(shards, 1)
    (loss + model.model.layers[0].mlp.up_proj.weight.square().sum()).backward()
    with pytest.raises(UserError, match=r"up_proj\.weight has a gradient in masked rows too"):
        mask.apply(shards, 1)
