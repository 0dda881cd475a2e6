"""Published numbers stand on the comparison of runs over the paper's orders, and on no other."""

import json

import yaml

from eval.report.compare import write_comparison
from eval.report.published import ORDERS
from pipeline.run.recipe_file import RECIPES
from tests.fake_runs import fake_run


def runs_over(folder, tasks):
    """Two runs that answer every task better after its stage."""
    runs = []
    for enabled in (True, False):
        run = fake_run(folder / str(enabled), trained=tuple(tasks), base=(), enabled=enabled)
        for place in sorted((run / "stages").iterdir()):
            stage = int(place.name[:2])
            scores = {t: {"value": 0.3 + 0.4 * (i < stage)} for i, t in enumerate(tasks)}
            (place / "tasks.json").write_text(json.dumps({"tasks": scores}))
        runs.append(run)
    return runs


def test_they_are_shown_in_grey_for_the_papers_orders_alone(tmp_path):
    tasks = ORDERS[5].split()
    page = write_comparison(runs_over(tmp_path / "a", tasks), tmp_path / "out")
    text = page.read_text()
    assert '<tr class="published"><td>SAPT-LoRA (published)</td><td class="n">82.0</td>' in text
    numbers = json.loads(page.with_name("report.json").read_text())
    assert numbers["published"][0]["accuracy"] == 82.0
    assert not any("SAPT" in name for name in numbers.get("accuracies", {}))  # never as one of ours
    other = write_comparison(runs_over(tmp_path / "b", tasks[::-1]), tmp_path / "other")
    assert "published" not in other.read_text().split("</style>")[-1]


def test_the_orders_are_those_of_the_recipes():
    for number, names in ORDERS.items():
        recipe = yaml.safe_load((RECIPES / f"t5_order{number}.yaml").read_text())
        assert [stage["domain"] for stage in recipe["stages"]] == names.split()
