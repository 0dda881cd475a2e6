"""Pretrained weights are all there, or the run says which are not: nothing starts from random
numbers that nobody asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine.config import resolve_ds_config
from pipeline.errors import UserError
from pipeline.model.load import build_model, check_pretrained, load_config, load_for_evaluation
from pipeline.recipe import Lora, Model
from pipeline.run.dry_run import describe_run
from pipeline.run.problems import recipe_problems
from pipeline.run.recipe_file import RECIPES, load_recipe
from pipeline.run.run import run_recipe
from tests.reference import MODELS

FAMILIES = {"roberta": "masked", "llama": "causal", "gpt2": "causal"}


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    """(folder, model settings) of a small pretrained model; llama's head is not tied."""
    folder = tmp_path / "model"
    MODELS[request.param]().save_pretrained(folder)
    return folder, Model(path=str(folder), objective=FAMILIES[request.param])


def refusals(folder, settings):
    """What the check before stage 0, training, and an evaluation say of a checkpoint."""
    calls = (
        lambda: check_pretrained(settings, load_config(settings)),
        lambda: build_model(settings, load_config(settings), None, seed=0),
        lambda: load_for_evaluation(folder, settings.objective, "sdpa"),
    )
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        yield str(caught.value)


def drop(folder, *suffixes):
    """Rewrite the weights without those whose name ends in one of `suffixes`; their names."""
    weights = load_file(folder / "model.safetensors")
    dropped = [n for n in weights if n.endswith(suffixes)]
    kept = {n: w for n, w in weights.items() if n not in dropped}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return dropped


def test_whole_weights_pass(saved):
    folder, settings = saved
    check_pretrained(settings, load_config(settings))
    load_for_evaluation(folder, settings.objective, "sdpa")


def test_missing_weights_are_named(saved):
    folder, settings = saved
    dropped = drop(folder, "mlp.up_proj.weight", "query.bias", "ln_1.weight")
    assert dropped
    for message in refusals(folder, settings):
        assert "model.initialize_missing" in message
        assert all(name.removeprefix("transformer.") in message for name in dropped)


def test_weights_of_another_shape_give_both_shapes(saved):
    folder, settings = saved
    config = json.loads((folder / "config.json").read_text())
    key = "n_positions" if "n_positions" in config else "intermediate_size"
    config[key] += 3
    (folder / "config.json").write_text(json.dumps(config))
    for message in refusals(folder, settings):
        assert "another shape" in message
        assert str(config[key]) in message
        assert str(config[key] - 3) in message


def test_damaged_files_are_named(saved):
    folder, settings = saved
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, word in (
        (pointer, "git lfs pull"),
        (whole[: len(whole) // 2], "damaged"),
        (whole[:5], "damaged"),
        (b"", "damaged"),
    ):
        file.write_bytes(content)
        for message in refusals(folder, settings):
            assert word in message
            assert str(file) in message


def test_missing_weights_are_initialised_on_demand_from_the_seed(saved):
    folder, settings = saved
    settings.initialize_missing = True
    with pytest.raises(UserError, match="has no effect"):
        build_model(settings, load_config(settings), None, seed=0)
    suffixes = ("mlp.up_proj.weight", "query.weight", "c_fc.weight")
    kept = load_file(folder / "model.safetensors")
    dropped = set(drop(folder, *suffixes))
    check_pretrained(settings, load_config(settings))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    models = [build_model(settings, load_config(settings), None, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (m.state_dict() for m in models)
    for name, weight in kept.items():
        assert torch.equal(first[name], again[name])
        if name in dropped:
            assert not torch.equal(first[name], other[name])
            assert not torch.equal(first[name], weight)
        else:
            assert torch.equal(first[name], weight)


def test_a_run_publishes_what_it_initialised_and_goes_on_from_there(tmp_path):
    """Stage 0 is the only place where the random head exists; a dry run refuses what a run does."""
    folder = tmp_path / "model"
    shutil.copytree(RECIPES / "demo_base", folder)
    drop(folder, "lm_head.dense.weight")
    overrides = [
        f"model.path={folder}", "data.domains={math: {embedded: math}}", "train.batch_size=4",
        "stages=[{domain: math, steps: 1}]", "data.heldout_sequences=4", "train.precision=fp32",
        "optimizer.lr=1e-30",
    ]  # fmt: skip
    recipe = load_recipe("demo", overrides)
    config = resolve_ds_config({}, recipe, 1, "cpu")
    with pytest.raises(UserError, match=r"lacks 1 .*lm_head\.dense\.weight"):
        describe_run(recipe, config, 1)
    with pytest.raises(UserError, match=r"lacks 1 .*lm_head\.dense\.weight"):
        run_recipe(recipe, config, tmp_path, pytest.fail, pytest.fail, lambda run: run)
    recipe.model.initialize_missing = True
    evaluated = []
    run_recipe(
        recipe,
        config,
        tmp_path,
        lambda engine, separation, task, _: evaluated.append(task.checkpoint),
        pytest.fail,
        lambda run: run,
    )
    assert [Path(c).parent.name for c in evaluated] == ["00_base", "01_math"]
    base, after = (load_file(Path(c) / "model.safetensors") for c in evaluated)
    assert "lm_head.dense.weight" in base
    assert all(torch.allclose(base[n], w) for n, w in after.items())  # the rate is next to nothing


def test_an_adapter_is_whole_too(saved):
    folder, settings = saved
    settings.lora = Lora(r=2)
    adapter = folder.parent / "adapter"
    build_model(settings, load_config(settings), None, seed=0).save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if "lora_B" in n)
    wider = {**weights, name: torch.zeros(len(weights[name]), 3)}
    for damage, word in (
        (
            lambda: save_file({n: w for n, w in weights.items() if n != name}, file),
            "lacks 1 weight",
        ),
        (lambda: save_file(wider, file), "another shape"),
        (lambda: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    ):
        damage()
        with pytest.raises(UserError, match=word):
            build_model(settings, load_config(settings), adapter, seed=0)
        with pytest.raises(UserError, match=word):
            load_for_evaluation(adapter, settings.objective, "sdpa")
    save_file(weights, file)
    load_for_evaluation(adapter, settings.objective, "sdpa")


def test_initialising_is_refused_where_it_makes_no_sense():
    recipe = load_recipe("demo", ["model.initialize_missing=true"])
    recipe.model.lora = Lora()
    assert any("would freeze the random weights" in p for p in recipe_problems(recipe))
    recipe.model.path, recipe.model.config = None, {"model_type": "roberta"}
    assert any("has no effect without `path`" in p for p in recipe_problems(recipe))
