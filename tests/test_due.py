"""`report.py due`: what is due is done once, whatever happens in between, and told once."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval.due.due
import eval.due.evaluate
import eval.due.every
from eval.due.due import due
from eval.due.evaluate import Outcome, evaluate, find_due
from eval.due.notify import Notify
from eval.due.state import locked
from eval.report.page import write_report
from launch.report import main
from pipeline.checkpoint import publish
from tests.fake_runs import fake_run, fake_tuning
from tests.published_runs import (
    NOTIFY,
    RECIPE,
    TELL,
    index,
    published_run,
    started,
    told,
    weights_of,
    working_directory,
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    return working_directory(tmp_path, monkeypatch)


def test_a_run_that_still_measures_is_not_told_as_finished(root, monkeypatch):
    """Its losses are there first; benchmarks and end tasks may take hours more."""
    from filelock import FileLock

    monkeypatch.setattr(eval.due.due, "write_report", write_report)
    run = published_run(root)
    due(root)
    with FileLock(run / ".lock"):
        due(root, notify=NOTIFY)
        assert index(root)["run"]["state"] == "finished"
        assert told() == []
    due(root, notify=NOTIFY)
    assert [event["kind"] for event in told()] == ["finished"]


def test_what_is_due_is_done_once(root, monkeypatch):
    monkeypatch.setattr(eval.due.due, "write_report", write_report)
    run = published_run(root)
    (run / "stages" / "01_a" / "step-000002").mkdir()
    inner = {"steps": 2, "progress": 2}
    place = run / "stages" / "01_a" / "step-000002" / "checkpoint"
    publish(place, weights_of("inner"), inner)
    page = due(root, notify=NOTIFY)
    assert len(started()) == 4  # the base too
    assert index(root)["run"]["state"] == "finished"
    record = json.loads((place.parent / "eval.json").read_text())
    assert (record["stage"], record["step"], record["progress"]) == (1, 2, 2)
    assert record["checkpoint"] == str(place)
    assert [event["kind"] for event in told()] == ["finished"]
    assert not list(run.rglob(".due"))
    kept = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert due(root, notify=NOTIFY) == page
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == kept
    assert (len(started()), len(told())) == (4, 1)


def test_a_damaged_checkpoint_is_marked_and_told_once(root):
    run = published_run(root)
    due(root, notify=NOTIFY)
    before = len(told())
    weights = run / "stages" / "01_a" / "checkpoint" / "model.safetensors"
    seen = weights.stat()
    weights.write_text("x" * seen.st_size)
    os.utime(weights, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # as a disk would do it
    for _ in range(2):
        due(root, notify=NOTIFY)
        entry = index(root)["run"]
        assert entry["state"] == "damaged"
        assert any("differs from its SHA-256" in text for text in entry["problems"])
        assert len(told()) == before + 1
    assert "model.safetensors" in told()[-1]["text"]
    assert len(started()) == 3  # and it was not evaluated


@pytest.mark.parametrize("manifest", ["", "[]", "{", '{"files": 3}'])
def test_a_damaged_manifest_is_a_damaged_checkpoint(root, manifest):
    run = published_run(root)
    (run / "stages" / "01_a" / "checkpoint" / "manifest.json").write_text(manifest)
    due(root)
    assert index(root)["run"]["state"] == "damaged"
    assert not any("01_a" in line for line in started())


def test_folders_that_are_no_runs_are_listed_with_the_reason(root):
    (root / "empty").mkdir()
    (root / "foreign").mkdir()
    (root / "foreign" / "notes.txt").write_text("x")
    (root / "lost" / "stages").mkdir(parents=True)
    fake_run(root / "sweep" / "inner")
    (fake_run(root / "nothing") / "recipe.yaml").write_text("")
    (fake_run(root / "half") / "recipe.yaml").write_bytes(b"name: x\nmodel: {path")
    for name in ("log.jsonl", "environment.json", "stages/01_math/eval.json"):
        (fake_run(root / f"no_{name[:3]}") / name).write_text("")
    (root / "half_stage" / "stages" / "01_math" / "eval.json").mkdir(parents=True)
    (root / "half_stage" / "recipe.yaml").write_text((root / "no_log" / "recipe.yaml").read_text())
    (root / "link").symlink_to("nowhere")
    fake_run(root / "good")
    due(root)
    found = index(root)
    states = {name: run["state"] for name, run in found.items()}
    unreadable = {n for n, state in states.items() if state == "unreadable"}
    assert unreadable == {"empty", "foreign", "lost", "nothing", "half"}
    assert found["empty"]["problems"] == ["it is empty"]
    assert "no recipe.yaml" in found["foreign"]["problems"][0]
    assert "recipe.yaml is missing" in found["lost"]["problems"][0]
    assert (states["good"], states["sweep/inner"]) == ("finished", "finished")
    assert (states["no_sta"], states["half_stage"]) == ("damaged", "damaged")
    assert all(run["problems"] for n, run in found.items() if states[n] != "finished")
    assert "./sweep/inner/report/index.html" in (root / "index.html").read_text()


def test_a_failed_evaluation_is_told_once_and_tried_again(root):
    run = published_run(root)
    behave = run / "stages" / "01_a" / "behave"
    behave.write_text("fail")
    for _ in range(2):
        due(root, notify=NOTIFY)
    assert [line.split("/")[-2] for line in started()[-1:]] == ["01_a"]
    assert len(started()) == 4
    (failure,) = [event for event in told() if event["kind"] == "failed"]
    assert "heldout: out of luck" in failure["text"]
    assert any("out of luck" in text for text in index(root)["run"]["problems"])
    behave.unlink()
    due(root, notify=NOTIFY)
    assert index(root)["run"]["problems"] == []


def test_a_checkpoint_that_is_deleted_meanwhile_is_no_failure(root, capsys):
    run = published_run(root)
    (run / "stages" / "01_a" / "behave").write_text("delete")
    due(root, notify=NOTIFY)
    assert "deleted or replaced meanwhile" in capsys.readouterr().out
    assert not (run / "stages" / "01_a" / "eval.json").exists()
    assert (run / "stages" / "02_b" / "eval.json").exists()
    assert not any(event["kind"] == "failed" and "eval" in event["title"] for event in told())


def test_the_budget_ends_a_call_and_what_it_cut_off_comes_first(root, monkeypatch):
    """In seconds of a clock that only evaluations move."""
    clock, lasts, seen = [0.0], {"00_base": 2, "01_a": 60, "02_b": 2}, []

    def measure(due, place, seconds, stop):
        seen.append(due.task.folder.name)
        clock[0] += min(lasts[seen[-1]], seconds)
        if lasts[seen[-1]] > seconds:
            return Outcome("cut")
        domains = {d: {"loss": 4.0, "stderr": 0.01} for d in "ab"}
        (place / "eval.json").write_text(json.dumps({"domains": domains}))
        return Outcome("done")

    monkeypatch.setattr(eval.due.evaluate, "_measure", measure)
    monkeypatch.setattr(eval.due.due, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    published_run(root)
    due(root, budget=4)  # the base took some of it
    left = json.loads((root / "index.json").read_text())["notes"]
    assert left == ["2 evaluations are left for the next call: the budget is spent."]
    assert index(root)["run"]["problems"] == []
    due(root, budget=4)  # all of it is not enough: a failure, which comes last from now on
    assert any("longer than the whole budget" in text for text in index(root)["run"]["problems"])
    lasts["01_a"] = 2
    due(root, budget=60)
    assert seen == ["00_base", "01_a", "01_a", "02_b", "01_a"]


def test_an_evaluation_that_is_cut_off_is_gone(root):
    run = published_run(root)
    (run / "stages" / "01_a" / "behave").write_text("slow")
    (one,) = [one for one in find_due(run, "run") if one.task.stage == 1]
    before = time.monotonic()
    assert evaluate(one, 1.0, lambda: False).kind == "cut"
    assert evaluate(one, None, lambda: time.monotonic() > before + 2).kind == "cut"
    assert time.monotonic() < before + 30  # it sleeps for 60
    assert not list(run.rglob(".due"))


def test_calls_do_not_overlap_and_training_runs_are_left_alone(root, capsys):
    from filelock import FileLock

    run = published_run(root)
    with locked(root) as mine:
        assert mine
        assert due(root) is None
    assert "another call is at work" in capsys.readouterr().out
    with FileLock(run / ".lock"):
        due(root)
        assert started() == []
    due(root)
    assert len(started()) == 3


def test_results_of_an_older_task_are_measured_again(root, monkeypatch):
    from eval.measure import benchmark_sources

    versions = {"arc_easy": 1.0}
    monkeypatch.setattr(benchmark_sources, "task_version", versions.get)
    run = published_run(root, stages=("01_a",))
    more = "evaluate: {benchmarks: {arc_easy: {}}}\n"
    (run / "recipe.yaml").write_text(RECIPE.format(name="run") + more)
    for stage in ("00_base", "01_a"):
        (run / "stages" / stage).mkdir(exist_ok=True)
        results = {"arc_easy": {"value": 0.5, "stderr": 0.1, "version": 1.0}}
        (run / "stages" / stage / "benchmarks.json").write_text(json.dumps({"benchmarks": results}))
        (run / "stages" / stage / "eval.json").write_text('{"domains": {}}')
    kinds = lambda: [one.kind for one in eval.due.evaluate.find_due(run, "run")]  # noqa: E731
    assert kinds() == []
    versions["arc_easy"] = 2.0
    assert kinds() == ["benchmarks"] * 2
    versions["arc_easy"] = 1.0
    (run / "recipe.yaml").write_text(RECIPE.format(name="run") + more.replace(
        "arc_easy: {}", "arc_easy: {}, piqa: {}"))  # fmt: skip
    assert kinds() == ["benchmarks"] * 2


def test_a_regression_is_told_once(root):
    fake_tuning(root / "worse", trained=("code", "law"), damage=0.25, limit=400)
    fake_tuning(root / "better", damage=-0.03, limit=400)
    for _ in range(2):
        due(root, notify=Notify(command=TELL, events=["regression"]))
    events = told()
    assert {event["run"] for event in events} == {"worse"}
    assert len(events) == len({event["id"] for event in events})
    assert "hellaswag fell by" in events[0]["text"]


def test_command_line(root, capsys, tmp_path):
    assert main(["due", "--root", "nowhere"]) == 2
    assert main(["due", "--root", "runs", "--budget", "soon"]) == 2
    assert main(["due", "--root", "runs", "--notify", "none.yaml"]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in ("no such folder", "write a time such as", "no such file"))
    assert main(["due", "--root", "runs", "--budget", "1h30m"]) == 0
    assert "page: runs/index.html" in capsys.readouterr().out
    (root / ".report" / "state.json").write_text("{")
    assert main(["due", "--root", "runs"]) == 2
    assert "Delete it" in capsys.readouterr().err
    for wrong in (["due", "--out", "x"], ["runs/run", "--budget", "2h"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_every_calls_again_without_overlap_and_knows_a_clock_that_was_set(monkeypatch, capsys):
    import signal

    monkeypatch.setattr(eval.due.every, "LOOK", 0.05)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    calls, running, clock = [], [], time.time

    def call(stop):
        assert not running
        running.append(1)
        calls.append(time.monotonic())
        time.sleep(0.3)  # longer than the interval
        running.pop()
        if len(calls) == 2:  # back by a day
            monkeypatch.setattr(eval.due.every.time, "time", lambda: clock() - 86400)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 3:
            raise ValueError("of one call")

    try:
        eval.due.every.every(0.1, call)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(calls) >= 4
    said = capsys.readouterr().out
    assert "the clock was set by -86,400 seconds" in said
    assert "error: of one call" in said


@pytest.mark.skipif(not os.environ.get("RUN_EVERYTHING"), reason="starts two evaluations")
def test_the_evaluation_is_that_of_the_command(tmp_path, monkeypatch):
    from eval.measure.lm import evaluate_share, merge_shares
    from pipeline.data.heldout import prepare_heldout
    from pipeline.data.prepare import prepare
    from pipeline.data.tokenizer import train_tokenizer
    from pipeline.model.load import load_for_evaluation
    from pipeline.run.recipe_file import load_recipe
    from tests.reference import MODELS

    monkeypatch.chdir(tmp_path)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    for name, step in (("a", 3), ("b", 5)):
        texts = [" ".join(words[(i * step + j * j) % 9] for j in range(25)) for i in range(80)]
        rows = [json.dumps({"text": f"{text} {i}"}) for i, text in enumerate(texts)]
        Path(f"{name}.jsonl").write_text("\n".join(rows))
    run = Path("runs/run")
    (run / "stages" / "01_a").mkdir(parents=True)
    more = "evaluate: {overlap: false}\n"
    text = RECIPE.format(name="run").replace("path: models/base", "path: base") + more
    text = text.replace("data: {", "data: {sequence_length: 18, heldout_sequences: 20, ")
    (run / "recipe.yaml").write_text(text)
    recipe = load_recipe(run / "recipe.yaml")
    tokenizer = train_tokenizer([" ".join(words)] * 3, 300)
    corpora = {name: prepare(recipe, name, tokenizer) for name in "ab"}
    prepare_heldout(recipe, tokenizer, corpora, run / "heldout")
    model = MODELS["llama"]()
    model.resize_token_embeddings(len(tokenizer))

    def save(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save(Path("base"))
    place = run / "stages" / "01_a" / "checkpoint"
    publish(place, save, {"stage": 1})
    due(Path("runs"))
    assert index(Path("runs"))["run"]["problems"] == []
    loaded = load_for_evaluation(place, "causal", "sdpa")
    evaluate_share(loaded, run / "heldout", Path("part.npz"), (0, 1), 32, False)
    merge_shares([Path("part.npz")], run / "heldout", Path("eval.json"), 0.7, {})
    wanted = json.loads(Path("eval.json").read_text())["domains"]
    found = json.loads((place.parent / "eval.json").read_text())["domains"]
    assert {d: r["loss"] for d, r in found.items()} == {d: r["loss"] for d, r in wanted.items()}
