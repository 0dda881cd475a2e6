"""Rows chosen per stage: the others are frozen, and nothing exists for them."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import pipeline.run.memory
from pipeline.checkpoint import publish
from pipeline.engine import optimizer
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.method_settings import Anchor, Distill, Ema, Ewc
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.split_linear import merge_rows, merge_weights, split_linears
from pipeline.ranks import rank, world_size
from pipeline.recipe import Mask
from pipeline.run.memory import activations, estimate, memory_lines, split_as_in_training
from pipeline.run.recipe_file import find_recipe, load_recipe
from pipeline.run.run import run_recipe
from pipeline.run.stage_rows import FrozenRows
from pipeline.run.train import train_stage
from pipeline.shard import ParameterShards
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_fsdp import fsdp_engine
from tests.test_parity import ENGINES, recipe_for, zero_engine
from tests.test_run import tiny_recipe

BUILD = {**{n: (e, zero_engine) for n, e in ENGINES.items()}, "fsdp": ({}, fsdp_engine)}
STRICT = Mask(threshold=0.7, criterion="random", update="strict")


def rows_of(model):
    """The rows that a mask with STRICT keeps in every step."""
    mask = GradientMask(model, STRICT, 0)
    mask.select(ParameterShards(model), 1)
    rows = {n: keep.clone() for n, (keep, _) in mask.rows_by_name(mask.keep).items()}
    mask.close()
    return rows


def trained(name, kind, split, count=3):
    """(weights, rows) after some steps with STRICT, or of the model that is split by its rows."""
    settings, build = BUILD[kind]
    recipe = recipe_for(name, 2 * world_size())
    recipe.mask = STRICT
    model = MODELS[name]().train()
    rows = rows_of(model)
    if split:
        split_linears(model, rows)
    engine = build(model, recipe, settings)
    mask = FrozenRows(engine.module) if split else GradientMask(engine.module, STRICT, 0)
    steps = micro_batches(name, count, world_size())
    mine = iter([step[rank() :: world_size()] for step in steps])
    train_stage(engine, mask, mine, recipe, 1, count, None)
    weights = {n: w.clone() for n, w in merge_weights(engine.module, engine.full_weights())}
    size = state_size(engine, recipe, mine, model)
    mask.close()
    engine.close()
    return weights, rows, size


def state_size(engine, recipe, batches, model):
    """Numbers on this rank in the gradients, the masters and the moments of the masked linears."""
    adam = engine._adam if hasattr(engine, "_adam") else engine._optimizer
    moments = [t for s in adam.state.values() for t in s.values() if torch.is_tensor(t)]
    masters = [p for g in adam.param_groups for p in g["params"]]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in [*moments, *masters]]
    return sum(t.numel() for t in local if t.dim())


def compare_engines():
    """By case: the largest difference to the mask; how many frozen rows moved; ordinary names."""
    found = {}
    for i, kind in enumerate(BUILD):
        name = list(MODELS)[i % 4]
        expected, rows, _ = trained(name, kind, split=False)
        weights, _, _ = trained(name, kind, split=True)
        assert list(weights) == list(expected)
        worst = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
        start = dict(MODELS[name]().named_parameters())
        moved = 0
        for n, keep in rows.items():
            change = (weights[n] != start[n]).any(0 if name == "gpt2" else 1)
            moved += int((change & ~keep).sum())
        found[kind] = worst, moved
    return found


@pytest.mark.parametrize("width", [7, 8])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_put_together_of_its_rows(dtype, start, width):
    """Copied in numbers of 8 bytes where rows and their places in a flat buffer are multiples."""
    flat, index = torch.randn(start + 8 * width).to(dtype), torch.randperm(8)
    kept, rest = flat[start:].view(8, width).split([3, 5])
    whole = merge_rows(kept, rest, index)
    assert torch.equal(whole[index], torch.cat([kept, rest]))


def test_a_split_model_trains_as_with_a_mask_that_never_changes():
    """Eq. 6: the masked rows do not move."""
    for results in run_ranks(compare_engines, 2):
        for case, (difference, moved) in results.items():
            assert difference < 1e-6, case
            assert moved == 0, case


def sizes(name):
    """By engine, the share of the state's numbers that a split model has, of masked linears."""
    found = {}
    for kind in ("zero2", "fsdp"):
        model = MODELS[name]()
        targeted = sum(t.weight.numel() for t in GradientMask(model, Mask(), 0).targets)
        rest = sum(p.numel() for p in model.parameters()) - targeted
        dense, split = (trained(name, kind, split=s, count=1)[2] for s in (False, True))
        # Masters and two moments of what is not masked are in both.
        found[kind] = dense, split, 3 * rest, 3 * targeted
    return found


def test_masked_rows_have_no_master_and_no_moment():
    for name in ("llama", "gpt2"):
        for dense, split, rest, targeted in run_ranks(partial(sizes, name), 1)[0].values():
            model = MODELS[name]()
            kept = sum(int(k.sum()) * model.get_parameter(n).numel() // len(k)
                       for n, k in rows_of(model).items())  # fmt: skip
            assert abs((dense - rest) - targeted) < 0.02 * targeted
            assert abs((split - rest) - 3 * kept) < 0.02 * 3 * kept


def nothing(*_):
    pass


def run(recipe, folder, *overrides, measure=nothing, losses=None):
    whole = load_recipe(recipe, [f"data.prepared={folder / 'prepared'}", *overrides])
    config = resolve_engine_config("ds_configs/zero2.json", whole, 1, "cpu")
    run_recipe(whole, config, folder / "runs", measure, nothing, nothing, losses)
    return folder / "runs" / whole.name


def test_a_run_with_rows_per_stage(tmp_path):
    """Ordinary checkpoints, in which exactly the chosen rows have changed; the second stage chooses
    its own, from weights that went through a lower precision and are continued in fp32."""
    recipe = tiny_recipe(tmp_path)
    refresh = ["mask={refresh: stage, calibration: 16}", "train.publish_dtype=bfloat16"]
    folder = run(recipe, tmp_path, "name=rows", *refresh)
    whole = run(recipe, tmp_path, "name=whole", "stages=[{domain: a, steps: 1}]")
    base = load_file(folder / "stages/00_base/checkpoint/model.safetensors")
    assert base.keys() == load_file(whole / "stages/01_a/checkpoint/model.safetensors").keys()
    chosen = []
    before = {n: w.bfloat16() for n, w in base.items()}
    for stage in ("01_a", "02_b"):
        after = load_file(folder / "stages" / stage / "checkpoint/model.safetensors")
        rows = load_file(folder / "stages" / stage / "rows/rows.safetensors")
        assert after.keys() == base.keys()
        for name, keep in rows.items():
            assert not (after[name] != before[name]).any(1)[keep == 0].any()
            assert int(keep.sum()) == len(keep) - len(keep) * 7 // 10
        chosen.append(torch.cat(list(rows.values())))
        before = after
    assert not torch.equal(*chosen)
    steps = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert {round(e["kept"], 1) for e in steps if e["event"] == "step"} == {0.3}
    with pytest.raises(UserError, match="gains nothing with LoRA"):
        load_recipe(recipe, [*refresh, "model.path=.", "model.config=null", "model.lora={}",
                             "model.train_tokenizer=null"])  # fmt: skip


def test_a_run_that_goes_on_has_the_rows_of_one_that_was_not_interrupted(tmp_path):
    """The second stage starts from the base, while what was published before it is measured: the
    weights behind the fourth step of the first stage, as the guard ends it behind the eighth."""
    recipe = tiny_recipe(tmp_path)
    settings = ["mask={refresh: stage, calibration: 16}", "start_from=base", "optimizer.lr=0.01",
                "guard={domain: a, steps: 4, against: stage}", "stages[1].steps=1"]  # fmt: skip
    trained = []

    def losses(engine, *_):
        trained.append({n: w.clone() for n, w in engine.full_weights(trained=True)})
        return {"a": 9.0 if len(trained) == 3 else 1.0}

    whole = run(recipe, tmp_path, "name=whole", *settings, losses=losses)
    after = load_file(whole / "stages/01_a/checkpoint/model.safetensors")
    for name, keep in load_file(whole / "stages/01_a/rows/rows.safetensors").items():
        kept = f"{name.removesuffix('.weight')}.kept"
        assert torch.equal(after[name][keep.bool()], trained[1][kept])
        assert not torch.equal(trained[2][kept], trained[1][kept])

    def ends(_engine, _separation, task, _recipe):
        if task.stage == 1:
            raise KeyboardInterrupt

    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, "name=broken", *settings, measure=ends, losses=losses)
    done = tmp_path / "runs/broken/stages/01_a"
    publish(done / "guarded-000003", lambda _: None, {"step": 3})  # of a kill behind publishing
    broken = run(recipe, tmp_path, "name=broken", *settings, losses=losses)
    assert {p.name for p in done.iterdir()} == {"checkpoint", "rows"}
    one, other = (load_file(x / "stages/02_b/rows/rows.safetensors") for x in (whole, broken))
    assert all(torch.equal(keep, other[n]) for n, keep in one.items())


def test_the_activations_are_what_a_forward_keeps():
    """Estimated without weights, against the tensors that autograd keeps of a real forward."""
    for name in ("roberta", "llama", "gpt2"):
        recipe = recipe_for(name, 2)
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage()._cdata] = t
            return t

        model = MODELS[name]().train()
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(2, 12, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(input_ids=ids).logits
        real = sum(t.untyped_storage().nbytes() for k, t in kept.items() if k not in own)
        with torch.device("meta"):
            empty = type(model)(model.config)
        head = 12 * logits.numel() * (1 if recipe.model.objective == "causal" else 0.15)
        guess = activations(empty, recipe, "fp32") - head
        assert abs(guess - real) < 0.15 * real, name


def test_the_update_counts_where_it_takes_more_than_the_activations(monkeypatch):
    recipe = recipe_for("llama", 1)
    recipe.data.sequence_length, recipe.train.micro_batch_size = 1, 1
    model = MODELS["llama"]()
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    config |= {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for smallest, group in ((10**9, matrices), (1, max(p.numel() for p in model.parameters()))):
        monkeypatch.setattr(optimizer, "SMALLEST", smallest)
        sizes = {k: sum(v) for k, v in estimate(model, recipe, config, 2).items()}
        assert sizes["update"] + sizes["activations"] == group // 2 * 6
    config["zero_optimization"]["stage"] = 3
    assert "update" not in estimate(model, recipe, config, 2)


def test_what_does_not_fit_comes_with_what_to_change(monkeypatch):
    recipe = recipe_for("llama", 8)
    config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}
    config["train_micro_batch_size_per_gpu"] = 2
    model = MODELS["llama"]()
    lines = memory_lines(model, recipe, config, 2)
    assert "does not fit" not in lines[-1]
    monkeypatch.setattr(pipeline.run.memory, "CHUNK", 100)
    monkeypatch.setattr(os, "sysconf", lambda name: 1)  # a machine of one byte
    *_, last = memory_lines(model, recipe, config, 2)
    for part in ("2 rank(s) in the memory of this machine", "model.gradient_checkpointing=true",
                 "train.micro_batch_size", "train.chunked_loss=true", "mask.refresh=stage",
                 "ds_configs/zero3.json"):  # fmt: skip
        assert part in last
    recipe.model.gradient_checkpointing = recipe.train.chunked_loss = True
    recipe.train.micro_batch_size = 1
    *_, last = memory_lines(model, recipe, config, 1)
    assert "checkpointing" not in last
    assert "chunked" not in last
    assert "micro_batch" not in last


def test_memory_of_methods(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, weights = MODELS["llama"](), sum(p.numel() for p in MODELS["llama"]().parameters())
    bf16 = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    bf16 |= {"gradient_accumulation_steps": 1}

    def of_methods(stage, **settings):
        recipe = replace(recipe_for("llama", 1), **settings)
        config = {**bf16, "zero_optimization": {"stage": stage}}
        return sum(estimate(model, recipe, config, 2).get("methods", (0, 0)))

    assert of_methods(2) == of_methods(2, anchor=Anchor()) == 0
    assert of_methods(2, anchor=Anchor(cache=0)) == of_methods(2, kd=Distill()) == 2 * weights
    assert of_methods(3, kd=Distill()) == weights
    assert of_methods(2, ema=Ema()) == pytest.approx(4 * weights / 2, abs=8)
    assert of_methods(0, ewc=Ewc()) == 3 * 4 * weights


def test_the_rows_of_7b_are_trained_on_one_gpu_of_80_gb():
    """As docs/performance.md has it, of one row of 2,048 tokens."""
    recipe = load_recipe(find_recipe("llama2_magicoder_rows"))
    config = resolve_engine_config("zero2_one_gpu", recipe, 1, "cuda")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    split_as_in_training(model, recipe)
    sizes = estimate(model, recipe, config, 1)
    assert 40e9 < sum(device + host for device, host in sizes.values()) < 48e9
