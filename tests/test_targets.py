"""Stages that end at a target: when they do, and how runs to the same target are compared."""

import json
from pathlib import Path

import pytest
import yaml

from eval.analysis.load import load_run
from eval.analysis.targets import targets_of
from eval.measure.lm import losses_in_engine, measure_in_engine
from eval.report.compare import compare, terminal_summary, write_comparison
from eval.report.page import write_report
from pipeline.engine.config import resolve_ds_config
from pipeline.errors import UserError
from pipeline.ranks import world_size
from pipeline.recipe import Stop
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from pipeline.run.stop import Target
from tests.fake_runs import fake_run
from tests.spawn import run_ranks
from tests.test_run import recipe  # noqa: F401  # a fixture


class Lines:
    def __init__(self):
        self.records = []

    def write(self, event, **values):
        self.records.append({"event": event, **values})


def test_the_target_is_looked_at_every_so_many_steps_and_at_the_end():
    for losses, reached in (
        ([3.0, 2.5, 2.3], [9]),
        ([3.0, 2.4, 2.0, 1.9], [6, 9, 10]),
        ([3] * 4, []),
    ):
        left, log = iter(losses), Lines()
        target = Target(Stop(2.4, "a", 3), 1, 10, lambda domain, left=left: next(left), log)
        ends = []
        for step in range(1, 11):
            if target.reached(step):
                ends.append(step)
                if len(losses) < 4:
                    break
        assert ends == reached
        assert [r["step"] for r in log.records] == [3, 6, 9, 10][: len(losses)]
        assert [r["reached"] for r in log.records] == [r["step"] in reached for r in log.records]


def to_a_target(path, runs):
    """A run whose first stage reaches its target; what is published is an average."""
    stops = ("stages[0].stop={loss: 5.4, steps: 2}", "stages[1].stop={loss: 0.01, steps: 3}")
    methods = ("ema={decay: 0.5}", "publish_average={start: 0.2}")
    loaded = load_recipe(path, [*stops, *methods, "optimizer.lr=1e-2", "stages[1].steps=5"])
    config = resolve_ds_config({"zero_optimization": {"stage": 2}}, loaded, world_size(), "cpu")
    return str(
        run_recipe(
            loaded, config, runs, measure_in_engine, pytest.fail, write_report, losses_in_engine
        )
    )


def test_a_stage_ends_where_its_target_is_reached(recipe, tmp_path):  # noqa: F811
    pages = run_ranks(to_a_target, 2, recipe, tmp_path)
    run = load_run(tmp_path / "tiny")
    first, second = targets_of(run)
    looks = [r for r in map(json.loads, (run.path / "log.jsonl").open()) if r["event"] == "target"]
    assert first.reached
    assert 2 <= first.step < 12
    assert not second.reached
    assert (second.step, run.log.ends[2]["steps"]) == (5, 5)
    for stage, end in ((1, first.step), (2, 5)):
        assert run.log.ends[stage]["steps"] == end
        assert [s["step"] for s in run.log.steps if s["stage"] == stage] == [*range(1, end + 1)]
        mine = [r for r in looks if r["stage"] == stage]
        assert [r["step"] for r in mine] == [
            s for s in range(1, end + 1) if s % (2, 3)[stage - 1] == 0 or (stage, s) == (2, 5)
        ]
        # What was looked at is what was published: the average.
        published = run.matrix.value(stage, "ab"[stage - 1])
        assert mine[-1]["loss"] == pytest.approx(published, abs=1e-6)
    assert all(r["loss"] > 5.4 for r in looks if r["stage"] == 1 and not r["reached"])
    assert "reached with" in Path(pages[0]).read_text(encoding="utf-8")


BASE = """
model: {path: unused/model}
data: {domains: {a: {embedded: math}, b: {embedded: python}}}
"""


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("stages: [{domain: a, steps: 9, stop: {loss: 2.0, steps: 9}}]", "stages[0].stop.steps"),
        ("stages: [{domain: a, steps: 9, stop: {loss: 0, steps: 2}}]", "stop.loss"),
        ("stages: [{domain: a, steps: 9, stop: {loss: 2, steps: 0}}]", "stop.steps"),
        ("stages: [{domain: a, steps: 9, stop: {steps: 2}}]", "stages[0].stop.loss: missing"),
        ("stages: [{domain: a, steps: 9, stop: {loss: 2, steps: 2, domain: c}}]", "'c' has no"),
        ("stages: [{domain: [a, b], steps: 9, stop: {loss: 2, steps: 2}}]", "name the domain"),
        ("stages: [{domain: a, steps: 9}]\nstop: {loss: 2, steps: 2}", "stop.domain: name"),
        ("stages: [{domain: a, steps: 9}]\nstop: {loss: 2, domain: b, steps: 2}", "no effect"),
        ("stages: [{domain: a, steps: 9}]\nstop: {loss: 2, domain: a}", "stop.steps: 20 has no"),
        (
            "stages: [{domain: a, steps: 9, stop: {loss: 2, steps: 2}}]\nevaluate: {domains: [b]}",
            "'a' has no held-out loss",
        ),
    ],
)
def test_targets_that_make_no_sense_are_refused(tmp_path, rest, message):
    path = tmp_path / "r.yaml"
    path.write_text(BASE + rest)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_a_stage_takes_its_own_target_before_the_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        BASE + "stages: [{domain: a, steps: 9}, {domain: [a, b], steps: 9},\n"
        "  {domain: a, steps: 9, stop: {loss: 1, steps: 3}}, {domain: b, steps: 9}]\n"
        "stop: {loss: 2, domain: a, steps: 4}"
    )
    loaded = load_recipe(path)
    common = Stop(2, "a", 4)
    assert [loaded.stop_of(i) for i in (1, 2, 3, 4)] == [common, common, Stop(1, "a", 3), None]


def to_targets(folder, wanted, measured, **options):
    """A fake run whose stages had these targets, and ended with these losses."""
    fake_run(folder, trained=("math", "python"), **options)
    known = yaml.safe_load((folder / "recipe.yaml").read_text())
    for stage, loss in zip(known["stages"], wanted, strict=True):
        stage["stop"] = {"loss": loss, "domain": None, "steps": 20}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(known))
    with (folder / "log.jsonl").open("a") as log:
        for stage, loss in enumerate(measured, start=1):
            for step, seen in ((20, loss + 1), (40, loss)):
                record = {"event": "target", "stage": stage, "step": step, "loss": seen}
                log.write(json.dumps(record | {"target": wanted[stage - 1]}) + "\n")
    return folder


def test_runs_to_the_same_target_are_compared_by_what_they_forgot_and_the_time(tmp_path):
    wanted = (4.5, 4.1)
    runs = [
        to_targets(tmp_path / "ft1", wanted, (4.4, 4.0), enabled=False),
        to_targets(tmp_path / "ft2", wanted, (4.45, 4.1), enabled=False, seed=1),
        to_targets(tmp_path / "migu", wanted, (4.4, 4.2)),
    ]
    [first, second] = targets_of(load_run(runs[2]))
    assert (first.domain, first.step, first.reached) == ("math", 40, True)
    assert not second.reached
    assert "not reached, 4.200" in second.told()
    comparison = compare(runs)
    tuned, masked = comparison.to_targets
    assert (tuned.runs, tuned.reached, tuned.missed, tuned.ratio) == (2, 2, "", 1)
    assert (masked.runs, masked.reached) == (1, 0)
    forgotten = [row.forgotten for row in comparison.rows[:2]]
    assert tuned.forgotten.startswith(f"{sum(forgotten) / 2:.3f} ± ")
    assert "to the same target" in terminal_summary(comparison)
    page = write_comparison(runs, tmp_path / "page").read_text()
    assert "To the same target" in page
    assert "not reached, 4.200" in page
    assert "reached with 4.400 after step 40" in write_report(runs[0]).read_text()
    # Another target, or none, in one of them: no such table.
    log = runs[1] / "log.jsonl"  # without the time of a stage: no part of it stands for all
    lines = log.read_text().splitlines()
    ends = [i for i, line in enumerate(lines) if json.loads(line)["event"] == "stage"]
    log.write_text("\n".join(lines[: ends[0]] + lines[ends[0] + 1 :]))
    first, second = compare(runs).to_targets
    assert (first.seconds, first.ratio, second.ratio) == ("—", None, None)
    assert second.seconds == masked.seconds
    other = to_targets(tmp_path / "other", (4.5, 4.0), (4.4, 4.0), seed=2)
    assert compare([runs[0], other]).to_targets == []
    assert compare([runs[0], fake_run(tmp_path / "plain")]).to_targets == []
