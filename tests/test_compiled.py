"""The blocks under torch.compile select the same rows and train the same weights."""

import itertools
import os
from contextlib import nullcontext

import pytest
import torch

import pipeline.model.compiled
from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.compiled import check_compiler, compiled_blocks
from pipeline.model.split_linear import split_linears
from pipeline.recipe import Mask
from pipeline.shard import ParameterShards
from tests.reference import MODELS, micro_batches, step_loss
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, compare, zero_engine

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))


def compare_engines():
    found, blocks = {}, []
    cases = [("zero2", zero_engine), ("fsdp", fsdp_engine)]
    every = itertools.product(cases, ("roberta", "llama", "gpt2"), (1, 3), (False, True))
    some = [(cases[0], "roberta", 3, False), (cases[1], "llama", 1, True)]
    for (engine, build), name, accumulation, checkpoint in every if EVERYTHING else some:

        def compiled(*args, build=build):
            engine = build(*args)
            blocks.append(compiled_blocks(engine.module, "aot_eager"))
            blocks[-1].__enter__()
            return engine

        key = f"{name}, {engine}, accumulation {accumulation}, checkpointing {checkpoint}"
        torch._dynamo.utils.counters.clear()
        settings = ENGINES.get(engine, {})
        flips, difference = compare(
            name, settings, accumulation, checkpoint=checkpoint, build=compiled,
            count=20 if EVERYTHING else 2,
        )  # fmt: skip
        blocks.pop().__exit__(None, None, None)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found[key] = flips, difference, graphs
    return found


def test_every_engine_trains_compiled_as_without():
    for results in run_ranks(compare_engines, 2):
        for case, (flips, difference, graphs) in results.items():
            assert flips == 0, case
            assert difference < 1e-6, case
            assert graphs > 0, case  # or it would show nothing


def test_the_compiler_itself_gives_the_same_rows_and_gradients():
    found = []
    for compiles in (False, True):
        model = MODELS["llama"]()
        del model.model.layers[1:]
        mask = GradientMask(model, Mask(threshold=0.7), 0)
        [batches] = micro_batches("llama", 1, 1)
        blocks = compiled_blocks(model)
        if compiles:
            blocks.__enter__()
        with mask.recording():
            loss = step_loss("llama", model, batches)
        loss.backward()
        mask.apply(ParameterShards(model), 1)
        if compiles:
            blocks.__exit__(None, None, None)
        assert not any("forward" in vars(m) for m in model.modules())
        found.append((mask.keep, {n: p.grad for n, p in model.named_parameters()}))
    (rows, plain), (again, compiled) = found
    assert torch.equal(rows, again)
    for n, gradient in plain.items():
        torch.testing.assert_close(compiled[n], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_in_two_parts_trains_compiled_as_without():
    found = []
    for compiles in (False, True):
        model = MODELS["llama"]()
        split_linears(model, {n: torch.arange(k.numel()) % 3 == 0 for n, k in linears_of(model)})
        [batches] = micro_batches("llama", 1, 1)
        with compiled_blocks(model, "aot_eager") if compiles else nullcontext():
            step_loss("llama", model, batches).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, compiled = found
    for n, gradient in plain.items():
        torch.testing.assert_close(compiled[n], gradient, rtol=1e-5, atol=1e-7)


def linears_of(model):
    """(the weight's name, its first column) of the linears of the blocks."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield f"model.layers.{name}.weight", module.weight[:, 0]


def test_a_hook_that_comes_later_is_not_left_out():
    model = MODELS["llama"]()
    ids = torch.arange(12)[None]
    seen = []
    with compiled_blocks(model, "aot_eager"):
        model(input_ids=ids)
        linear = model.model.layers[1].mlp.up_proj
        hook = linear.register_forward_hook(lambda *_: seen.append(1))
        model(input_ids=ids)
        hook.remove()
        model(input_ids=ids)
    assert seen == [1]


@pytest.mark.parametrize("name", ["roberta", "llama", "t5"])
def test_batches_of_other_lengths_are_not_compiled_anew(name):
    model = MODELS[name]()
    mask = GradientMask(model, Mask(threshold=0.7), 0)
    torch._dynamo.utils.counters.clear()
    graphs, kept = [], []
    with compiled_blocks(model, "aot_eager"):
        for length in (12, 11, 10, 9):
            ids, real = torch.arange(3 * length).view(3, -1), torch.ones(3, length)
            real[1:, -2:] = 0
            own = {"labels": ids[:, :4].contiguous()} if name == "t5" else {}
            with mask.recording(real, own.get("labels")):
                model(input_ids=ids, attention_mask=real, **own).logits.sum().backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            mask.apply(ParameterShards(model), 1)
            kept.append(mask.keep)
    plain = GradientMask(model, Mask(threshold=0.7), 0)
    with plain.recording(real, own.get("labels")):
        model(input_ids=ids, attention_mask=real, **own).logits.sum().backward()
    plain.apply(ParameterShards(model), 1)
    assert torch.equal(kept[-1], plain.keep)
    assert graphs[1] == graphs[3]


def test_code_that_is_compiled_again_and_again_is_not_left_to_run_slowly(monkeypatch):
    monkeypatch.setattr(pipeline.model.compiled, "GRAPHS", 1)
    model = MODELS["llama"]()
    del model.model.layers[1:]
    linear = model.model.layers[0].mlp.up_proj

    def compile_again():
        with compiled_blocks(model, "aot_eager"):
            for _ in range(3):
                model(input_ids=torch.arange(12)[None])
                linear.register_forward_hook(lambda *_: None)

    with pytest.raises(UserError, match=r"train\.compile: .* set it to false"):
        compile_again()


def test_without_a_compiler_it_is_said(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.compile: .* C\+\+ compiler"):
        check_compiler()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(UserError, match=r"train\.compile: Triton needs a C compiler"):
        check_compiler()
