"""The forgetting guard."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from eval.analysis.log import interventions
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import Interrupted, UserError
from pipeline.recipe import Guard
from pipeline.run import stage as stage_module
from pipeline.run.guard import Watch
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.spawn import run_ranks
from tests.test_run import command, evaluation, finish, recipe

__all__ = ["recipe"]  # a fixture
CAUSAL = [
    "model={objective: causal, train_tokenizer: 300, config: {model_type: gpt2, n_embd: 16,"
    " n_layer: 1, n_head: 2, n_positions: 34}}",
    "stages=[{domain: a, steps: 6}, {domain: b, steps: 2}]", "evaluate.benchmarks={b: {}}",
    "guard={benchmark: b, max_fall: 5, steps: 2, against: stage}", "ema={decay: 0.5}",
    "start_from=nearest",
]  # fmt: skip


@pytest.mark.parametrize("action", ["stop", "lower_lr", "warn"])
@pytest.mark.parametrize("against", ["base", "stage"])
@pytest.mark.parametrize("what", ["domain", "benchmark"])
def test_what_the_guard_does(tmp_path, action, against, what):
    """Stage 0 had a loss of 2.0, the stage begins at 2.02, and it rises by 0.01 a step; or points
    that fall by a hundred times as much."""
    kept, measured = [], []
    now = [0]

    def measure(step):
        assert step == now[0]
        measured.append(step)
        loss = 2.02 + 0.01 * step
        return loss if what == "domain" else 300 - 100 * loss

    settings = Guard("general", max_rise=0.045, steps=2, action=action, against=against)
    if what == "benchmark":
        settings = Guard(None, benchmark="b", max_fall=4.5, steps=2, action=action, against=against)
    guard = Watch(settings, 1, 7, measure, kept.append, None)
    base, before = tmp_path / "00_base", tmp_path / "before"
    for folder, loss in ((base, 2.0), (before, 2.02)):
        folder.mkdir()
        (folder / "eval.json").write_text(json.dumps({"domains": {"general": {"loss": loss}}}))
        points = {"benchmarks": {"b": {"value": 3 - loss}}}
        (folder / "benchmarks.json").write_text(json.dumps(points))
    guard.begin(base, before)
    ended = None
    for now[0] in range(1, 8):
        if guard.after_step(now[0]):
            ended = now[0]
            break
        assert not guard.after_step(now[0])  # once more, as where a run goes on: nothing is done
    first = 4 if against == "base" else 6  # the first check over the limit
    checks = [step for step in measured if step]
    assert checks == ([n for n in (2, 4, 6) if n <= first] if action == "stop" else [2, 4, 6, 7])
    assert ended == (first if action == "stop" else None)
    assert kept == ([n for n in (0, 2, 4) if n < first] if action == "stop" else [])
    over = [n for n in (2, 4, 6, 7) if n >= first]
    assert guard.lr_factor == (0.5 ** len(over) if action == "lower_lr" else 1.0)
    assert guard.stopped_at == ended
    again = Watch(settings, 1, 7, measure, kept.append, None)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.state_dict() == guard.state_dict()


def test_a_benchmark_that_was_not_measured_is_said(tmp_path):
    guard = Watch(Guard(benchmark="b"), 1, 100, lambda step: None, lambda step: None, None)
    (tmp_path / "benchmarks.json").write_text('{"benchmarks": {}, "skipped": {"b": "no network"}}')
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"guard\.benchmark: .* has no result of b"):
            guard.begin(folder, folder)
    guard.reference = 50.0
    assert not guard.after_step(50)  # a check whose evaluation failed ends nothing


def test_the_guard_ends_a_stage_that_forgets_and_publishes_what_was_before(recipe):
    """The second stage learns other words so fast that those of the first are forgotten."""
    overrides = [
        "stages=[{domain: a, steps: 20}, {domain: b, steps: 20}, {domain: a, steps: 2}]",
        "optimizer={lr: 2.0e-2, schedule: constant}", "mask.enabled=false",
        "guard={domain: a, max_rise: 0.2, steps: 2, against: stage}",
    ]  # fmt: skip
    code, output = finish(command(recipe, *overrides))
    assert code == 0, output
    run = recipe.parent / "runs/tiny"
    assert "guard: held-out loss of a has risen" in output
    records = [json.loads(line) for line in (run / "log.jsonl").open()]
    checks = [r for r in records if r["event"] == "guard" and r["stage"] == 2]
    [*passed, last] = checks
    assert all(r["rise"] <= 0.2 and r["action"] is None for r in passed)
    assert last["rise"] > 0.2
    assert last["action"] == "stop"
    [end] = [r for r in records if r["event"] == "stage" and r["stage"] == 2]
    before = last["step"] - 2
    assert end["guard"] == {"stopped_at": last["step"], "published": before}
    # What is published has the loss of the last check that passed (or of the stage's start).
    measured = evaluation(run, "02_b")["domains"]["a"]["loss"]
    start = evaluation(run, "01_a")["domains"]["a"]["loss"]
    assert measured == pytest.approx(passed[-1]["loss"] if passed else start, abs=1e-5)
    assert (run / "stages/03_a/eval.json").is_file()  # the run goes on
    assert not list(run.rglob("guarded-*"))
    assert "The guard ended stage 2" in (run / "report/index.html").read_text()


def watched(recipe):
    """A run whose benchmark falls by two points a step of its first stage and stays in its second,
    which starts from the base; the evaluation behind step 4 is ended by a signal, the first time.
    What is published is an average. The stages and steps that were evaluated, and what the log says
    of the first stage and of the second's check."""
    from eval.measure.lm import losses_in_engine, measure_in_engine

    runs = recipe.parent / "runs"
    asked = load_recipe(recipe, CAUSAL)
    config = resolve_engine_config(None, asked, 1, "cpu")
    evaluated, weights = [], {}

    def evaluate(task, recipe, pending):
        evaluated.append((task.stage, task.step))
        assert pending == ["benchmarks"]
        fallen = 0
        if task.stage == 1 and task.step is not None:
            weights[task.step] = load_file(f"{task.checkpoint}/model.safetensors")
            fallen = 0.02 * task.step
        if evaluated.count((1, 4)) == 1 and evaluated[-1] == (1, 4):
            raise Interrupted("SIGTERM")
        result = {**task.describe(), "benchmarks": {"b": {"value": 0.9 - fallen}}, "skipped": {}}
        (task.folder / "benchmarks.json").write_text(json.dumps(result))

    stage_module.nearest_start = lambda *_: 0  # in a process of its own

    def run():
        run_recipe(
            asked, config, runs, measure_in_engine, evaluate, lambda f: f, losses_in_engine
        )  # fmt: skip

    with pytest.raises(Interrupted):
        run()
    run()
    stage = runs / "tiny/stages/01_a"
    published = load_file(stage / "checkpoint/model.safetensors")
    assert all(torch.equal(w, weights[2][n]) for n, w in published.items())
    assert not all(torch.equal(w, weights[4][n]) for n, w in published.items())
    for end in (stage, runs / "tiny/stages/02_b"):  # of each, the weights of a check behind step 2
        for name in ("eval.json", "benchmarks.json"):
            known, at_end = (json.loads((p / name).read_text()) for p in (end / "step-000002", end))
            assert at_end.pop("checkpoint") == str(end / "checkpoint")
            assert known.pop("checkpoint") == str(end / "step-000002/checkpoint")
            assert known.pop("step") == 2
            del known["progress"]
            assert at_end == known
        text = "sequences.npz"
        assert (end / text).read_bytes() == (end / "step-000002" / text).read_bytes()
    records = [json.loads(line) for line in (runs / "tiny/log.jsonl").open()]
    *first, second = [r for r in records if r["event"] == "guard"]
    checks = [(r["step"], r["points"], r["action"]) for r in first]
    [ended, whole] = [r["guard"] for r in records if r["event"] == "stage"]
    assert whole is None
    told = interventions(SimpleNamespace(guards={1: first[-1]}, bad_steps=[]), ["base", "a", "b"])
    return evaluated, checks, ended, told, second


def test_a_benchmark_is_watched_within_a_stage_and_measured_once_for_each_weights(recipe):
    [(evaluated, checks, end, told, second)] = run_ranks(watched, 1, recipe)
    assert evaluated == [(0, None), (1, 2), (1, 4), (1, 4), (2, 2)]
    assert checks == [(2, pytest.approx(86), None), (4, pytest.approx(82), "stop")]
    assert end == {"stopped_at": 4, "published": 2}
    assert (second["stage"], second["fall"]) == (2, 0)  # since the base, not since stage 1
    assert told[0].startswith(
        "The guard ended stage 1 (a): b had fallen by 8.000 points, over 5, at step 4."
    )
