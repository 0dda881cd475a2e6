"""The forgetting guard."""

import json

import pytest

from pipeline.recipe import Guard
from pipeline.run.guard import Watch
from tests.test_run import command, evaluation, finish, recipe

__all__ = ["recipe"]  # a fixture


@pytest.mark.parametrize("action", ["stop", "lower_lr", "warn"])
@pytest.mark.parametrize("against", ["base", "stage"])
def test_what_the_guard_does(tmp_path, action, against):
    """Stage 0 had a loss of 2.0, the stage begins at 2.02, and it rises by 0.01 a step."""
    kept, measured = [], []
    now = [0]

    def measure(domain):
        measured.append((domain, now[0]))
        return 2.02 + 0.01 * now[0]

    guard = Watch(
        Guard("general", max_rise=0.045, steps=2, action=action, against=against),
        1, 7, measure, kept.append, None,
    )  # fmt: skip
    base = tmp_path / "eval.json"
    base.write_text('{"domains": {"general": {"loss": 2.0}}}')
    guard.begin(base)
    ended = None
    for now[0] in range(1, 8):
        if guard.after_step(now[0]):
            ended = now[0]
            break
    first = 4 if against == "base" else 6  # the first check over the limit
    checks = [step for domain, step in measured if domain == "general" and step]
    assert checks == ([n for n in (2, 4, 6) if n <= first] if action == "stop" else [2, 4, 6, 7])
    assert ended == (first if action == "stop" else None)
    assert kept == ([n for n in (0, 2, 4) if n < first] if action == "stop" else [])
    over = [n for n in (2, 4, 6, 7) if n >= first]
    assert guard.lr_factor == (0.5 ** len(over) if action == "lower_lr" else 1.0)
    assert guard.stopped_at == ended
    again = Watch(
        Guard("general", action=action, against=against), 1, 7, measure, kept.append, None
    )
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (again.reference, again.lr_factor) == (guard.reference, guard.lr_factor)


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
