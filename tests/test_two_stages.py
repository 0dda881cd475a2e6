"""Runs over two stages: every baseline together, and end tasks from the recipe to the page."""

import json

from eval.measure.checkpoint import Checkpoint, measure_share, merge
from eval.measure.process import _arguments
from eval.report.page import write_report
from pipeline.engine.config import resolve_engine_config
from pipeline.run.evaluation import Evaluation
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.test_run import tiny_recipe


def run(folder, overrides, evaluate=lambda *_: None, report=lambda *_: None):
    fixed = [f"data.prepared={folder}/prepared", "evaluate.overlap=false"]
    recipe = load_recipe(tiny_recipe(folder), [*fixed, *overrides])
    config = resolve_engine_config("ds_configs/zero0.json", recipe, 1, "cpu")
    run_recipe(recipe, config, folder / "runs", lambda *_: None, evaluate, report)
    return folder / "runs" / recipe.name


def test_the_baselines_go_together_in_a_run(tmp_path):
    methods = ["das={sequences: 24}", "ewc={}", "kd={}", "derpp={sequences: 16}"]
    folder = run(tmp_path, [*methods, "train.micro_batch_size=4"])
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    assert len(steps) == 24
    assert [("derpp" in e.get("methods", {})) for e in steps] == [False] * 12 + [True] * 12
    kept = {p.relative_to(folder / "kept").as_posix() for p in (folder / "kept").rglob("*.*")}
    assert kept == {
        "das/stage-00.safetensors", "das/stage-01.safetensors", "derpp/stage-01.safetensors",
        "ewc/stage-01/rank-0000.safetensors", "ewc/stage-02/rank-0000.safetensors",
    }  # fmt: skip


def test_kept_rows_may_be_of_any_length(tmp_path):
    more = ["data.packing=false", "stages=[{domain: a, steps: 2}, {domain: b, steps: 3}]"]
    folder = run(tmp_path, ["derpp={sequences: 33}", *more])
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum("derpp" in e.get("methods", {}) for e in events if e["event"] == "step") == 3


def test_end_tasks_follow_the_stages_of_their_domains(tmp_path, monkeypatch):
    monkeypatch.setattr(  # in this process
        "eval.measure.end_tasks.run_side_by_side",
        lambda function, jobs, *_: [function(*job) for job in jobs] and {},
    )
    for name in ("a", "cites"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
        for split, count in (("train", 12), ("test", 6)):
            rows = [{"text": f"river stone {i}", "label": "xy"[i % 2]} for i in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "tasks" / name / f"{split}.jsonl").write_text(text)
    tasks = "{a: {epochs: 1}, cites: {epochs: 1, domain: b}}"
    overrides = [
        f"evaluate.end_tasks={{files: {tmp_path}/tasks, tasks: {tasks}, seeds: [1, 2]}}",
        "stages=[{domain: a, steps: 2}, {domain: b, steps: 2}]",
    ]
    asked = []

    def evaluate(task, recipe, kinds):
        assert kinds == ["end_tasks"]
        arguments = _arguments(task, recipe, kinds, 0, 1)
        now = arguments[arguments.index("--end-tasks") + 1 : arguments.index("--tasks")]
        asked.append((task.stage, now))
        checkpoint = Checkpoint(task.checkpoint, None, None, "masked", "fp32", "sdpa", "cpu")
        settings = recipe.evaluate
        assert measure_share(checkpoint, kinds, settings, None, task.folder, (0, 1), 0, now) == []
        assert merge(task.folder, kinds, 1, settings, None, 0.7, task.describe()) == []

    folder = run(tmp_path, overrides, evaluate)
    assert asked == [(1, ["a"]), (2, ["a", "cites"])]
    last = Evaluation(folder, 2, "b", "").folder / "end_tasks.json"
    record = json.loads(last.read_text())
    assert record["stage"] == 2
    assert {n: t["domain"] for n, t in record["tasks"].items()} == {"a": "a", "cites": "b"}
    assert list(record["tasks"]["a"]["seeds"]) == ["1", "2"]
    run(tmp_path, overrides, evaluate)  # nothing is left to do
    assert len(asked) == 2
    last.unlink()
    run(tmp_path, overrides, evaluate)
    assert json.loads(last.read_text()) == record  # from what lies in end_tasks/
    write_report(folder)
    numbers = json.loads((folder / "report/report.json").read_text())["end_tasks"]
    assert numbers["rows"]["tiny"]["forgetting_score"] is not None
