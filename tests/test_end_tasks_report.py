"""The pages' numbers of end tasks, from invented run folders."""

import json

import pytest

from eval.analysis.end_tasks import estimate, read_end_tasks, table
from eval.analysis.load import load_run
from eval.report.compare import write_comparison
from eval.report.page import write_report
from eval.report.summary import end_task_lines
from tests.fake_runs import fake_run
from tests.test_report import assert_self_contained, text_of

TASKS = {"math": "math", "code": "python", "c": "cpp", "news": "news"}
# By stage and task: the scores of two seeds. `news` is about no domain of the stages.
SCORES = {
    1: {"math": (0.80, 0.70)},
    2: {"code": (0.50, 0.60)},
    3: {"math": (0.70, 0.66), "code": (0.52, 0.54), "c": (0.9, 0.9), "news": (0.2, 0.4)},
}


def measured(folder, shift=0.0, stages=SCORES, **options):
    run = fake_run(folder, **options)
    for stage, scores in stages.items():
        [home] = (run / "stages").glob(f"{stage:02d}_*")
        tasks = {
            name: {
                "domain": TASKS[name],
                "metric": "macro_f1",
                "seeds": {
                    str(i): {"score": s + shift, "accuracy": s + shift + 0.05}
                    for i, s in enumerate(pair)
                },
            }
            for name, pair in scores.items()
        }
        (home / "end_tasks.json").write_text(json.dumps({"stage": stage, "tasks": tasks}))
    return run


def test_the_numbers_are_those_of_the_definitions(tmp_path):
    run = measured(tmp_path / "a")
    matrix, warnings = read_end_tasks(load_run(run))
    assert warnings == []
    assert matrix.own == {"math": 1, "code": 2, "c": 3}
    assert matrix.final("score") == pytest.approx([2.32 / 4, 2.5 / 4])
    assert matrix.forgetting("score") == pytest.approx([(0.1 - 0.02) / 2, (0.04 + 0.06) / 2])
    assert matrix.of_stages((1, 2), "accuracy") == pytest.approx([0.66, 0.65])
    shown = table([matrix])
    assert shown["last_two"].mean == pytest.approx((0.76 + 0.77) / 2)
    assert shown["score"].mean == pytest.approx(0.6025)
    # Two numbers: 12.706 standard errors, each half of the difference.
    assert shown["score"].half == pytest.approx(12.706 * 0.045 / 2)
    other, _ = read_end_tasks(load_run(measured(tmp_path / "b", shift=0.1, seed=1)))
    both = table([matrix, other])  # over the runs, not the seeds
    assert both["score"].mean == pytest.approx(0.6525)
    assert both["score"].half == pytest.approx(12.706 * 0.05)
    assert both["forgetting_score"].half == pytest.approx(0, abs=1e-9)
    # Where every stage has a model of its own, a task's result is that of its stage.
    recipe = tmp_path / "alone/recipe.yaml"
    measured(tmp_path / "alone")
    recipe.write_text(f"start_from: base\n{recipe.read_text()}")
    alone, _ = read_end_tasks(load_run(tmp_path / "alone"))
    assert alone.final("score") == pytest.approx([(0.8 + 0.5 + 0.9 + 0.2) / 4, 0.65])
    assert alone.forgetting("score") == [0, 0]
    # ... and no mean is known as long as a task of the recipe is not measured.
    asked = {"tasks": {"math": {}, "code": {"domain": "python"}}}
    recipe.write_text(f"{recipe.read_text()}evaluate: {json.dumps({'end_tasks': asked})}\n")
    for stage in (2, 3):
        next(recipe.parent.glob(f"stages/{stage:02d}_*/end_tasks.json")).unlink()
    under_way, _ = read_end_tasks(load_run(recipe.parent))
    assert (under_way.tasks, under_way.own) == (["math", "code"], {"math": 1, "code": 2})
    assert under_way.final("score") == under_way.of_stages((1, 2), "score") == []
    # A seed more at one stage is no pair for those of another.
    more = SCORES | {1: {"math": (0.80, 0.70, 0.75)}}
    several, _ = read_end_tasks(load_run(measured(tmp_path / "more", stages=more)))
    assert several.forgetting("score") == []
    assert several.final("score") == matrix.final("score")
    assert estimate([[0.5]]).half is None
    assert estimate([[0.5, 0.4], []]) is None


def test_the_pages_show_them(tmp_path):
    runs = [measured(tmp_path / "migu"), measured(tmp_path / "ft", shift=0.1, enabled=False)]
    page = write_report(runs[0])
    assert_self_contained(page)
    text = text_of(page)
    assert "End tasks" in text
    assert "60.25" in text  # MF1
    assert "+4.50" in text  # forgotten
    found = json.loads((runs[0] / "report/report.json").read_text())["end_tasks"]
    assert found["rows"]["migu"]["forgetting_score"]["mean"] == pytest.approx(0.045)
    page = write_comparison(runs, tmp_path / "compared")
    assert_self_contained(page)
    rows = json.loads((tmp_path / "compared/report.json").read_text())["end_tasks"]["rows"]
    assert sorted(row["score"]["mean"] for row in rows.values()) == pytest.approx([0.6025, 0.7025])
    assert "70.25" in text_of(page)
    # All at once: nothing older that could be forgotten, and the bound of the others' end tasks.
    alone = {"trained": ("math",), "base": (), "lr": 2e-3}
    runs.append(measured(tmp_path / "bound", stages={1: {"math": (0.9, 0.7)}}, **alone))
    text = text_of(write_comparison(runs, tmp_path / "bounded"))
    assert "it has nothing to forget" in text
    rows = json.loads((tmp_path / "bounded/report.json").read_text())["end_tasks"]["rows"]
    bound = max(rows.values(), key=lambda row: row["score"]["mean"])
    assert bound["score"]["mean"] == pytest.approx(0.8)
    assert bound["first_two"] is bound["last_two"] is None


def test_the_terminal_shows_the_matrix_and_the_papers_numbers(tmp_path):
    _, title, head, *rows, numbers = "\n".join(
        end_task_lines(load_run(measured(tmp_path / "run")))
    ).split("\n")
    assert "macro-F1" in title
    assert head.split() == ["math", "code", "c", "news"]
    assert [row.split()[1:] for row in rows] == [
        ["75.0", "-", "-", "-"],
        ["-", "55.0", "-", "-"],
        ["68.0", "53.0", "90.0", "30.0"],
    ]
    assert "MF1 60.2" in numbers
    assert "Forgetting, MF1 4.5" in numbers


def test_a_damaged_file_is_told_and_the_rest_shown(tmp_path):
    run = measured(tmp_path / "a")
    [home] = (run / "stages").glob("01_*")
    for content in ("{", '{"tasks": {"math": {"seeds": {"1": {"score": null}}}}}', "[1]"):
        (home / "end_tasks.json").write_text(content)
        text = text_of(write_report(run))
        assert "end_tasks.json" in text
        assert "60.25" in text
