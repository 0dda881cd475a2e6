"""The base of a run takes what a run beside it has measured of the same base."""

import json
import os
import threading

import pytest
import yaml
from safetensors.torch import load_file

from eval.measure.lm import measure_in_engine
from pipeline import signals
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import Interrupted
from pipeline.ranks import world_size
from pipeline.run.evaluation import Evaluation, one_measures, take_base
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.spawn import run_ranks
from tests.test_anchor_run import build_base
from tests.test_run import tiny_recipe

OTHER = {"base.json": {"path": {"model.safetensors": "x"}}}


def write_run(runs, name, recipe, **changes):
    """What a run has written before its base is measured; its evaluation of the base."""
    run = runs / name
    (run / "heldout").mkdir(parents=True)
    content = yaml.safe_load(recipe.to_yaml())
    for place, value in changes.pop("settings", {}).items():
        *path, last = place.split(".")
        node = content
        for key in path:
            node = node[key]
        node[last] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    environment = {
        "commit": "abc", "dirty": False, "versions": {"torch": "2.13"},
        "hardware": {"device": "cpu"}, "engine": "DeepSpeed ZeRO-2", "precision": "fp32",
    }  # fmt: skip
    files = {
        "environment.json": {**environment, **changes.pop("environment", {})},
        "base.json": {"path": None, "tokenizer": None},
        "heldout/manifest.json": {"files": {"a": "1"}},
        "ds_config.json": {"train_batch_size": 8},
    }
    for file, value in files.items():
        (run / file).write_text(json.dumps(changes.get(file, value)))
    return Evaluation(run, 0, "base", f"{run}/stages/00_base/checkpoint")


def measured(base, kind="eval.json"):
    base.folder.mkdir(parents=True, exist_ok=True)
    (base.folder / "sequences.npz").write_bytes(b"losses")
    (base.folder / "share-0.part").write_bytes(b"begun")
    found = {"stage": 0, "checkpoint": base.checkpoint, "domains": {"a": {"loss": 2.5}}}
    (base.folder / kind).write_text(json.dumps(found))


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(tiny_recipe(tmp_path))


def test_it_is_measured_once(recipe, tmp_path):
    runs = tmp_path / "runs"
    first = write_run(runs, "first", recipe)
    assert take_base(first, recipe) is None
    measured(first)
    second = write_run(runs, "second", recipe, settings={"seed": 7, "optimizer.lr": 0.5})
    assert take_base(second, recipe) == "first"
    result = json.loads((second.folder / "eval.json").read_text())
    assert result["domains"] == {"a": {"loss": 2.5}}
    assert result["checkpoint"] == second.checkpoint
    assert result["measured_by"] == "first"
    assert sorted(p.name for p in second.folder.iterdir()) == ["eval.json", "sequences.npz"]
    assert take_base(second, recipe) is None  # it has all
    stage = Evaluation(runs / "second", 1, "a", "x")
    assert take_base(stage, recipe) is None


def test_who_comes_while_it_is_measured_waits(recipe, tmp_path, monkeypatch):
    runs, found = tmp_path / "runs", []
    first, second = (write_run(runs, name, recipe) for name in ("first", "second"))
    another = write_run(runs, "another", recipe, settings={"mask.threshold": 0.5})

    def wait(base):
        with one_measures(base, recipe):
            found.append(take_base(base, recipe))

    with one_measures(first, recipe):
        waiting = threading.Thread(target=wait, args=[second])
        waiting.start()
        wait(another)  # has to measure something else
        assert found == [None]
        assert waiting.is_alive()
        measured(first)
    waiting.join(20)
    assert found == [None, "first"]
    assert not list(runs.glob(".base-*"))

    third, fourth = (write_run(runs, name, recipe, **OTHER) for name in ("third", "fourth"))
    monkeypatch.setattr(signals._wish, "reason", "SIGTERM")
    with one_measures(third, recipe), pytest.raises(Interrupted):
        wait(fourth)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"mask.threshold": 0.5}},
        {"settings": {"data.sequence_length": 16}},
        {"settings": {"evaluate.batch_size": 5}},
        {"environment": {"commit": "def"}},
        {"environment": {"dirty": True}},
        {"environment": {"hardware": {"device": "cuda"}}},
        {"heldout/manifest.json": {"files": {"a": "2"}}},
        {"ds_config.json": {"train_batch_size": 4}},
        OTHER,
    ],
)
def test_another_base_or_another_measurement_is_not_taken(recipe, tmp_path, changes):
    first = write_run(tmp_path / "runs", "first", recipe, **changes)
    measured(first)
    second = write_run(tmp_path / "runs", "second", recipe)
    assert take_base(second, recipe) is None
    assert not second.folder.exists()


def test_a_base_that_was_asked_other_tasks_is_not_taken(recipe, tmp_path):
    """Asked when they have been seen, the base has the tasks that are never trained."""

    def base(name, asked, domain):
        stages = [{"domain": domain, "steps": 3}]
        settings = {"evaluate.answers": {"asked": asked}, "stages": stages}
        return write_run(tmp_path / asked, name, recipe, settings=settings)

    for asked, other in (("seen", None), ("all", "first")):
        measured(base("first", asked, "a"))
        assert take_base(base("second", asked, "b"), recipe) == other
        assert take_base(base("third", asked, "a"), recipe) == "first"


def test_a_benchmark_whose_file_has_changed_is_measured_again(recipe, tmp_path):
    file = tmp_path / "questions" / "arc_challenge" / "test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    overrides = [
        "evaluate.benchmarks={arc_challenge: {}}", f"evaluate.benchmark_files={tmp_path}/questions",
        "model.objective=causal", "model.config.model_type=llama",
    ]  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(path.read_text().replace(", hidden_dropout_prob: 0.1", ""))
    recipe = load_recipe(path, overrides)
    first = write_run(tmp_path / "runs", "first", recipe)
    measured(first, "benchmarks.json")
    assert take_base(write_run(tmp_path / "runs", "second", recipe), recipe) == "first"
    later = (first.folder / "benchmarks.json").stat().st_mtime + 10
    os.utime(file, (later, later))
    assert take_base(write_run(tmp_path / "runs", "third", recipe), recipe) is None


# What draws random numbers (dropout, the anchor's order) or keeps something between steps.
UNDISTURBED = {
    "zero0": ("ema={decay: 0.5}",),
    "zero1": ("mask.refresh=stage",),
    "zero2": ("mask.refresh=3", "mask.backward=row_sparse"),
    "zero2_one_gpu": ("LORA",),
    "zero3": ("train.micro_batch_size=2",),
    "fsdp": ("anchor={text: random, tokens: 1k, fraction: 0.25, cache: 0}",),
}
if not os.environ.get("RUN_EVERYTHING"):
    UNDISTURBED = {e: UNDISTURBED[e] for e in ("zero2_one_gpu", "zero3", "fsdp")}


def with_and_without_evaluations(folder, recipe, base):
    """By case: whether the weights are the same."""
    nothing = lambda *_: None  # noqa: E731
    lora = f"model={{path: {base}, objective: causal, lora: {{r: 4, quantize: 4bit}}}}"
    found = {}
    for engine, settings in UNDISTURBED.items():
        weights = []
        for measured in (True, False):
            every = "evaluate_every: 1, " if measured else ""
            overrides = [
                *(lora if o == "LORA" else o for o in settings), f"name={engine}-{measured}",
                f"stages=[{{domain: a, {every}steps: 4}}]", "optimizer.lr=0.01",
                f"data.prepared={folder}/prepared",
            ]  # fmt: skip
            if engine == "fsdp":
                overrides.append("engine.kind=fsdp")
            whole = load_recipe(recipe, overrides)
            json_file = None if engine == "fsdp" else f"ds_configs/{engine}.json"
            config = resolve_engine_config(json_file, whole, world_size(), "cpu")
            measure = measure_in_engine if measured else nothing
            run_recipe(whole, config, folder / "runs", measure, nothing, nothing)
            checkpoint = folder / "runs" / whole.name / "stages/01_a/checkpoint"
            [file] = checkpoint.glob("*.safetensors")
            weights.append(load_file(file))
        with_them, without = weights
        found[engine] = all(w.equal(without[n]) for n, w in with_them.items())
    return found


def test_an_evaluation_leaves_training_as_it_is(tmp_path):
    """After each step and before the first one: to the bit, with dropout."""
    path, base = tiny_recipe(tmp_path), build_base(tmp_path / "base")
    for found in run_ranks(with_and_without_evaluations, 2, tmp_path, path, base):
        assert found == dict.fromkeys(UNDISTURBED, True)
