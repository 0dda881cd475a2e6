"""The pages of instruction tuning: tasks, points within stages, and the figures of both."""

import html
import json
import math
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest

from eval.analysis.labels import differences, methods_of
from eval.analysis.load import load_run
from eval.analysis.matrix import forgotten_at
from eval.analysis.settings import Setting, measure
from eval.report.compare import compare, terminal_summary, write_comparison
from eval.report.page import write_report
from eval.report.summary import task_lines
from tests.fake_runs import HOSTILE, UNREACHABLE, fake_run, fake_tuning
from tests.test_report import assert_self_contained, text_of

ALWAYS = {"domain_curves", "training_loss"}


def figures(page):
    return {path.stem for path in page.parent.glob("*.svg")} - ALWAYS


def numbers(page):
    return json.loads((page.parent / "report.json").read_text())


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_page_shows_what_the_files_say(tmp_path):
    run = fake_tuning(tmp_path / "tuned")
    page = write_report(run)
    assert_self_contained(page)
    text, points = text_of(page), numbers(page)["points"]
    assert [point["label"] for point in points] == [
        "before training", "epoch 2", "epoch 4", "epoch 6", "end, epoch 8",
    ]  # fmt: skip
    assert [point["position"] for point in points] == [0, 2, 4, 6, 8]
    folders = ["00_base", *(f"01_code/step-{n:06d}" for n in (15, 30, 45)), "01_code"]
    for folder, point in zip(folders, points, strict=True):
        read = {
            name: json.loads((run / "stages" / folder / f"{name}.json").read_text())
            for name in ("eval", "humaneval", "benchmarks")
        }
        scores = [*read["benchmarks"]["benchmarks"].values(), *(
            score for k, score in read["humaneval"]["sampled"].items() if k.startswith("pass")
        )]  # fmt: skip
        shown = [(score["value"], score["stderr"]) for score in scores]
        shown.append((read["benchmarks"]["average"], read["benchmarks"]["average_stderr"]))
        greedy = read["humaneval"]["greedy"]
        for value, stderr in [*shown, (greedy["pass@1"], greedy["stderr"])]:
            assert f"{100 * value:.1f} ± {100 * stderr:.1f}" in text
        for domain in read["eval"]["domains"].values():
            assert f"{domain['loss']:.3f} ± {domain['stderr']:.3f}" in text
        assert point["benchmarks"] == read["benchmarks"]
        assert point["humaneval"] == read["humaneval"]
    for said in (
        "first 20 problems", "first 100 documents", "0 shots", "lm-eval 0.4.13",
        "sandbox: landlock (landlock ABI 6, seccomp, rlimits)", "10 samples a problem",
        "Examples longer than a sequence, left out: 12 of 4,012 of stage 1 (code)",
    ):  # fmt: skip
        assert said in text
    assert figures(page) == {"tasks", "benchmarks", "pareto_tasks", "pareto_loss"}


def test_a_stage_that_ended_early_ends_where_it_did(tmp_path):
    run = fake_tuning(tmp_path / "early")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in log:
        record["steps"] = 60 if record["event"] == "stage" else 64  # taken, planned
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    end = numbers(write_report(run))["points"][-1]
    assert (end["label"], end["position"]) == ("end, epoch 7.5", 7.5)


def test_learning_since_stage_0_by_hand(tmp_path):
    page = write_report(fake_tuning(tmp_path / "two", trained=("code", "math")))
    points = numbers(page)["points"]
    start, within = points[0]["loss"], points[6]
    assert (within["stage"], within["step"], within["position"]) == (2, 30, 12)
    now = within["loss"]
    gains = [start[domain] - now[domain] for domain in ("code", "math")]
    since = within["since_stage_0"]
    assert since["learned"] == pytest.approx(statistics.mean(gains))
    assert since["forgotten"] == pytest.approx(now["prose"] - start["prose"])
    assert 0 < since["learned_stderr"] < 0.02 * 2  # paired over the text of both evaluations
    # The learning curve takes code from the end of its stage, and as lost what it rose by since.
    end = points[4]["loss"]
    curve = within["learning_curve"]
    learned = (start["code"] - end["code"] + start["math"] - now["math"]) / 2
    assert curve["learned"] == pytest.approx(learned)
    best = min(start["prose"], end["prose"])
    forgotten = (now["prose"] - best + now["code"] - end["code"]) / 2
    assert curve["forgotten"] == pytest.approx(forgotten)


def test_completions_are_text(tmp_path):
    page = write_report(fake_tuning(tmp_path / "hostile"))
    assert_self_contained(page)
    (shown, *_) = re.findall(r"(?s)<pre><code>(.*?)</code></pre>", page.read_text())
    assert html.unescape(shown) == HOSTILE[:-3] + "\ufffd" * 3
    assert "failed, AssertionError: <b>" in text_of(page)
    assert "greedy completions passed" in text_of(page)


@pytest.mark.parametrize(
    ("missing", "drawn"),
    [
        ("humaneval*", {"tasks", "benchmarks", "pareto_loss"}),
        ("benchmarks.*", {"tasks", "pareto_loss"}),
        ("eval.json", {"tasks", "benchmarks", "pareto_tasks"}),
        ("*.npz", {"tasks", "benchmarks", "pareto_tasks", "pareto_loss"}),
        ("*.jsonl.gz", {"tasks", "benchmarks", "pareto_tasks", "pareto_loss"}),
    ],
)
def test_only_what_exists_is_drawn(tmp_path, missing, drawn):
    runs = [fake_tuning(tmp_path / name, enabled=name == "b", epochs=4) for name in "ab"]
    for path in (runs[0] / "stages").rglob(missing):
        path.unlink()
    page = write_report(runs[0])
    assert figures(page) == drawn
    assert ("HumanEval greedy" in text_of(page)) == (missing != "humaneval*")
    compare(runs)


def test_many_runs_of_which_few_have_tasks(tmp_path):
    """The figures label methods at the run that learned most, which here has no tasks."""
    runs = [fake_tuning(tmp_path / f"{s}", enabled=s % 2 > 0, seed=s, epochs=2) for s in range(9)]
    ranked = sorted(compare(runs).rows, key=lambda row: row.learned)
    least = {row.method: row.run.name for row in reversed(ranked)}
    for run in runs:
        if run.name not in least.values():
            for path in [*run.rglob("humaneval*"), *run.rglob("benchmarks*")]:
                path.unlink()
    page = write_comparison(runs, tmp_path / "out")
    for figure in ("tasks", "benchmarks", "pareto_tasks"):
        svg = (page.parent / f"{figure}.svg").read_text()
        assert all(f">{method}</text>" in svg for method in least), figure


def test_damaged_and_unfinished_runs_are_told(tmp_path):
    run = fake_tuning(tmp_path / "half", skipped=("winogrande",))
    within = run / "stages" / "01_code" / "step-000030"
    (within / "benchmarks.json").write_text("{")
    (within / "humaneval_completions.jsonl.gz").write_bytes(b"no archive")
    change(within / "eval.json", domains={"code": {"loss": math.nan, "stderr": 0.1}})
    for path in (run / "stages" / "01_code").glob("*.*"):
        path.unlink()
    change(
        run / "stages" / "01_code" / "step-000045" / "humaneval.json", sandbox={"level": "unsafe"}
    )
    page = write_report(run)
    text = text_of(page)
    assert "step-000030/benchmarks.json cannot be read" in text
    assert "The loss on code at step 30 of stage 1 (code) is nan" in text
    where = "stage 0 base, stage 1 code (epoch 2), stage 1 code (epoch 6)"
    assert f"winogrande was skipped at {where}: {UNREACHABLE}" in text
    assert "Under way: the last point is stage 1 code (epoch 6)" in text
    assert "ran without a sandbox" in text
    assert "HumanEval was not measured alike at all points" in text
    assert [p["label"] for p in numbers(page)["points"]][-1] == "epoch 6"
    assert compare([run, fake_tuning(tmp_path / "ft", enabled=False)]).damaged == ["half"]


def test_in_a_comparison_the_last_point_counts_as_the_end_so_far(tmp_path):
    run = fake_tuning(tmp_path / "half", skipped=("winogrande",))
    for path in (run / "stages" / "01_code").glob("*.*"):
        path.unlink()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(x for x in lines if '"event": "step"' in x))
    page = write_report(run)
    comparison = compare([run, fake_tuning(tmp_path / "ft", enabled=False)])
    assert comparison.rows[0].end.step == 45
    assert comparison.rows[0].learned == numbers(page)["points"][-1]["learning_curve"]["learned"]
    assert comparison.rows[0].benchmarks is None  # an average over two does not compare
    assert comparison.rows[1].benchmarks is not None
    assert "so far: stage 1, epoch 6" in text_of(
        write_comparison([run, tmp_path / "ft"], tmp_path / "out")
    )


def test_page_of_a_masked_lm_has_nothing_of_tasks(tmp_path):
    page = write_report(fake_run(tmp_path / "masked", heldout="text"))
    assert re.findall("<h2>(.*?)</h2>", page.read_text()) == [
        "Loss of every domain after every stage",
        "Learning and forgetting over the stages",
        "In numbers",
        "Which rows matter to which domain",
        "Training loss",
        "Time",
        "What was run",
    ]
    assert figures(page) == set()
    runs = [tmp_path / "masked", fake_run(tmp_path / "ft", enabled=False, heldout="text")]
    assert "HumanEval" not in text_of(write_comparison(runs, tmp_path / "out"))


def test_equal_learning_is_read_between_points_within_stages(tmp_path):
    runs = [fake_tuning(tmp_path / "ft", enabled=False), fake_tuning(tmp_path / "migu")]
    comparison = compare(runs)
    curves = []
    for run in runs:
        points = [point["learning_curve"] for point in numbers(write_report(run))["points"]]
        curves.append([(point["learned"], point["forgotten"]) for point in points])
    assert [row.curve for row in comparison.rows] == curves
    level = curves[1][-1][0]
    assert comparison.level == level
    assert comparison.rows[0].forgotten_equal == pytest.approx(forgotten_at(curves[0], level))
    coarse = forgotten_at([curves[0][0], curves[0][-1]], level)
    assert comparison.rows[0].forgotten_equal != pytest.approx(coarse, rel=0.01)
    assert comparison.pairs[0].forgotten_equal.noise is not None
    page = write_comparison(runs, tmp_path / "out")
    assert [len(run["points"]) for run in numbers(page)["runs"]] == [5, 5]
    assert "as if the stage had ended there" in text_of(page)
    # With a single stage, the learning curve is the curve since stage 0.
    assert figures(page) == {"trade_off", "tasks", "benchmarks", "pareto_tasks"}


def test_differences_in_accuracy_are_paired_over_the_documents(tmp_path):
    runs = [fake_tuning(tmp_path / "ft", enabled=False, damage=0.1), fake_tuning(tmp_path / "migu")]
    ((first, second, found),) = compare(runs).task_differences
    assert (first, second) == ("ft, lr 1e-3", "migu T=0.7, lr 1e-3")
    arrays = [np.load(run / "stages" / "01_code" / "benchmarks.npz") for run in runs]
    errors = []
    for name in arrays[0].files:
        apart = arrays[1][name].astype(float) - arrays[0][name]
        errors.append(apart.std(ddof=1) / math.sqrt(100))
        assert found[name].value == pytest.approx(apart.mean())
        assert found[name].stderr == pytest.approx(errors[-1])
        assert found[name].paired
    assert found["average"].stderr == pytest.approx(math.hypot(*errors) / 3)
    assert found["humaneval"].paired
    page = write_comparison(runs, tmp_path / "out")
    shown = found["average"]
    assert f"{100 * shown.value:+.1f} ± {100 * shown.stderr:.1f}" in text_of(page)
    saved = numbers(page)["task_differences"][0]["tasks"]["average"]
    assert saved["value"] == pytest.approx(shown.value)

    path = runs[1] / "stages" / "01_code"
    record = json.loads((path / "benchmarks.json").read_text())
    single = [
        json.loads((run / "stages" / "01_code" / "benchmarks.json").read_text())["benchmarks"]
        for run in runs
    ]
    (path / "benchmarks.npz").unlink()
    record["benchmarks"]["winogrande"]["limit"] = None
    (path / "benchmarks.json").write_text(json.dumps(record))
    ((_, _, found),) = compare(runs).task_differences
    apart = math.hypot(*(entry["hellaswag"]["stderr"] for entry in single))
    assert found["hellaswag"].stderr == pytest.approx(apart)
    assert not found["hellaswag"].paired
    assert found["winogrande"].stderr is found["average"].stderr is None
    assert "not measured alike" in text_of(write_comparison(runs, tmp_path / "out"))


def test_tasks_are_averaged_over_seeds(tmp_path):
    runs = [
        fake_tuning(tmp_path / f"{enabled}-{seed}", enabled=enabled, seed=seed, limit=1000)
        for enabled in (False, True)
        for seed in (0, 1)
    ]
    comparison = compare(runs)
    ft = comparison.settings[0]
    values = [row.benchmarks.value for row in comparison.rows[:2]]
    assert ft.benchmarks == pytest.approx(statistics.mean(values))
    assert ft.spread["benchmarks"] == pytest.approx(statistics.stdev(values))
    text = text_of(write_comparison(runs, tmp_path / "out"))
    assert f"{100 * ft.benchmarks:.1f} ± {100 * ft.spread['benchmarks']:.1f}" in text
    summary = terminal_summary(comparison)
    assert f"Benchmarks {100 * values[0]:.1f} ± " in summary


def test_runs_that_differ_in_more_than_the_seed_are_no_repetitions(tmp_path):
    runs = [
        fake_tuning(tmp_path / "first"),
        fake_tuning(tmp_path / "again", seed=1, every=4),  # how often does not matter
        fake_tuning(tmp_path / "short", seed=2, epochs=4),
    ]
    comparison = compare(runs)
    assert [setting.runs for setting in comparison.settings] == [[0, 1], [2]]
    assert comparison.rows[2].label == "migu T=0.7 (as short), lr 1e-3"


def test_several_stages_and_units_share_an_axis(tmp_path):
    two = fake_tuning(tmp_path / "two", trained=("code", "math"))
    other = fake_tuning(tmp_path / "ft", trained=("code", "math"), enabled=False)
    page = write_comparison([two, other], tmp_path / "out")
    assert "pareto_loss" in figures(page)
    assert "epochs" in (page.parent / "tasks.svg").read_text()
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("epochs: 8", "steps: 60", 1))
    again = write_comparison([two, other], tmp_path / "out")
    svg = (again.parent / "tasks.svg").read_text()
    assert ">stages<" in svg
    assert ">epochs<" not in svg


def test_lines_for_the_terminal(tmp_path):
    run = load_run(fake_tuning(tmp_path / "tuned", skipped=("winogrande",)))
    lines = task_lines(run)
    end = run.points[-1]
    greedy = f"{100 * end.greedy.value:.1f} ± {100 * end.greedy.stderr:.1f}"
    assert lines[-3].split()[:4] == ["code", *greedy.split()]
    assert "first 20 problems" in lines[-2]
    assert "winogrande was skipped at 5 points" in lines[-1]
    assert task_lines(load_run(fake_run(tmp_path / "masked"))) == []


def test_an_adapter_is_a_method_of_its_own():
    def run(lora, masked, **more):
        mask = {"enabled": masked, "threshold": 0.7, "criterion": "output"}
        return SimpleNamespace(recipe={"model": {"path": "m", "lora": lora}, "mask": mask} | more)

    lora = {"r": 8, "quantize": "none"}
    runs = [
        run(None, False),
        run(lora, False),
        run(lora, True),
        run({"r": 8, "quantize": "4bit"}, False),
    ]
    assert methods_of(runs) == ["ft", "lora", "lora, migu T=0.7", "qlora"]
    assert methods_of([run(lora, False), run({**lora, "r": 16}, False)]) == [
        "lora, lora.r 8", "lora, lora.r 16",
    ]  # fmt: skip
    # An adapter a stage has its own name, and older text is named where only some have it.
    replay = [{"domain": "a", "steps": 3, "replay": None}, {"domain": "b", "replay": 0.02}]
    runs = [runs[0], runs[1], run({**lora, "incremental": True}, False)]
    runs.append(run(lora, False, stages=replay))
    assert methods_of(runs) == ["ft", "lora", "inclora", "lora, replay 0.02"]
    assert methods_of(runs[-1:]) == ["lora, replay 0.02"]
    assert methods_of(runs[-1:] * 2) == ["lora", "lora"]
    named = [{"domain": "a", "steps": 3}, {"domain": "b", "replay": {"general": 0.05}}]
    assert methods_of([run(None, False), run(None, False, stages=named)]) == ["ft", "replay 0.05"]
    # So are the methods that have a key of their own, told apart by their settings.
    averaged = [run(None, False, ema={"decay": d}, anchor=None) for d in (0.9, 0.99)]
    both = run(None, True, ema={"decay": 0.9}, publish_average={"start": 0.3})
    assert methods_of([runs[0], *averaged, both]) == [
        "ft", "ema, decay 0.9", "ema, decay 0.99", "ema, publish_average, migu T=0.7, decay 0.9",
    ]  # fmt: skip
    assert differences([runs[0], *averaged]) == []
    # All domains in one stage are what the others could reach at most.
    stages = [{"domain": "a", "steps": 3}, {"domain": "b", "steps": 3}]
    several = run(None, False, stages=stages, name="several")
    once = run(None, False, stages=[{"domain": ["a", "b"], "steps": 6}], name="once")
    assert methods_of([several, once]) == ["ft", "all at once"]
    assert methods_of([once]) == ["ft"]
    for different in (several, once):
        different.name = different.recipe["name"]
    [told] = differences([several, once])
    assert "number of their stages (several: 2; once: 1)" in told


def test_a_rate_that_learns_nothing_is_no_point_of_its_method():
    settings = [
        Setting("ft 1", "ft", 1e-4, [0]), Setting("ft 2", "ft", 3e-4, [1]),
        Setting("ft 3", "ft", 1e-3, [2]), Setting("migu", "migu", 3e-4, [3]),
    ]  # fmt: skip
    ends = [(0.1, 0.0), (0.2, 0.1), (-0.3, 0.9), (0.15, 0.02)]
    numbers = measure([[(0.0, 0.0), end] for end in ends], settings, [])
    assert numbers["between", "ft", "migu"] == pytest.approx(0.05)
    ends[3] = (-0.1, 0.3)
    numbers = measure([[(0.0, 0.0), end] for end in ends], settings, [])
    assert numbers["between", "ft", "migu"] is None
