"""A sweep runs every point once, goes on where it was broken off, and keeps failures apart."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launch.sweep import _typed, main
from pipeline.errors import UserError
from pipeline.run.folder import open_run
from pipeline.run.recipe_file import find_recipe, load_recipe
from pipeline.run.sweep import (
    SWEEPS,
    Sweep,
    load_sweep,
    of_the_best,
    require_same_runs,
    sweep_points,
)
from pipeline.run.sweep_runs import jobs_at_once, run_sweep, submit_sweep
from tests.corpora import write_cl_benchmark

ROOT = Path(__file__).resolve().parent.parent
# Stands for launch/cpt.py: notes what it was asked, and fails as often as a file says.
RUN = """
import pathlib, sys, time
runs, name, *rest = sys.argv[2:]
folder = pathlib.Path(runs)
with (folder / "started").open("a") as file:
    file.write(name.removeprefix("name=") + "\\n")
time.sleep(0.2)
(folder / name.removeprefix("name=")).mkdir(exist_ok=True)
failures = folder / (name.removeprefix("name=") + ".failures")
left = int(failures.read_text()) if failures.exists() else 0
if left:
    failures.write_text(str(left - 1))
    if left < 3:
        print("error: out of luck", file=sys.stderr)
    sys.exit(1 if "lr_0.002" in name else 75)
"""
SWEEP = Sweep(
    "demo",
    methods={"ft": {"mask.enabled": False}, "migu": {}},
    grid={"optimizer.lr": [1e-3, 2e-3]},
    grids={"migu": {"optimizer.lr": [4e-3]}},
    seeds=2,
)


def command() -> list[str]:
    return [sys.executable, "-c", RUN]


def started(folder: Path) -> list[str]:
    return sorted((folder / "started").read_text().split())


def test_points_are_the_products_of_each_methods_own_grid():
    points = {p.name: p.overrides for p in sweep_points(SWEEP)}
    assert sorted(points) == [
        "ft-lr_0.001-seed_0", "ft-lr_0.001-seed_1", "ft-lr_0.002-seed_0", "ft-lr_0.002-seed_1",
        "migu-seed_0", "migu-seed_1",
    ]  # fmt: skip
    assert points["ft-lr_0.002-seed_1"] == ("mask.enabled=false", "optimizer.lr=0.002", "seed=1")
    assert points["migu-seed_0"] == ("optimizer.lr=0.004", "seed=0")
    # Ended early it has every setting: with the first seed all of them, then with the next.
    assert [name[-1] for name in points] == ["0"] * 3 + ["1"] * 3


def test_a_run_that_would_fail_again_is_not_started_again(tmp_path, capsys):
    points = sweep_points(replace(SWEEP, methods={"ft": {}}, grids={}, seeds=1))
    (tmp_path / "ft-lr_0.002.failures").write_text("1")
    outcomes = run_sweep(points, command(), tmp_path, jobs=2)
    assert [o.code for o in outcomes.values()] == [0, 1]
    assert started(tmp_path) == sorted(outcomes)
    log = outcomes["ft-lr_0.002"].log
    assert f"ft-lr_0.002 failed: out of luck; see {log}\n" in capsys.readouterr().out
    (tmp_path / "ft-lr_0.002.failures").write_text("3")  # without a word: the log has the older one
    assert run_sweep(points, command(), tmp_path, jobs=2)["ft-lr_0.002"].said == ""
    assert f"ft-lr_0.002 failed; see {log}\n" in capsys.readouterr().out


def test_every_point_runs_once_and_failures_are_tried_again(tmp_path):
    points = sweep_points(SWEEP)
    (tmp_path / "ft-lr_0.001-seed_0.failures").write_text("1")  # the second attempt works
    (tmp_path / "migu-seed_1.failures").write_text("2")  # none of this call does
    outcomes = run_sweep(points, command(), tmp_path, jobs=3)
    failed = [name for name, o in outcomes.items() if not o.finished]
    assert failed == ["migu-seed_1"]
    assert all(0 < o.cpu_seconds < 60 for o in outcomes.values())
    assert "out of luck" in Path(outcomes["migu-seed_1"].log).read_text()
    twice = ["ft-lr_0.001-seed_0", "migu-seed_1"]
    assert started(tmp_path) == sorted([p.name for p in points] + twice)
    # The same sweep again tries only what failed.
    again = run_sweep(points, command(), tmp_path, jobs=3)
    assert all(o.finished for o in again.values())
    # What was broken off and goes on took the time of all its attempts, here two and one.
    before, after = outcomes["migu-seed_1"], again["migu-seed_1"]
    assert after.seconds > before.seconds
    assert before.seconds >= 0.4
    assert after.cpu_seconds > before.cpu_seconds
    begun = [p.name for p in points] + [*twice, "migu-seed_1"]
    assert started(tmp_path) == sorted(begun)
    # What was deleted is run again.
    (tmp_path / "ft-lr_0.002-seed_0").rmdir()
    run_sweep(points, command(), tmp_path, jobs=3)
    assert started(tmp_path) == sorted([*begun, "ft-lr_0.002-seed_0"])
    with pytest.raises(UserError, match="a folder of its own"):
        run_sweep(sweep_points(Sweep("demo", {"migu": {}}, seeds=2)), command(), tmp_path, jobs=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_its_runs_and_goes_on(tmp_path, number):
    script = f"""
import signal, sys
from pathlib import Path
from pipeline.run.sweep import Sweep, sweep_points
from pipeline.run.sweep_runs import run_sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born ignoring it
slow = "import os, time\\nprint(os.getpid(), flush=True)\\ntime.sleep(100)"
points = sweep_points(Sweep("demo", seeds=2))
run_sweep(points, [sys.executable, "-c", slow], Path({str(tmp_path)!r}), 2)
"""
    sweep = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    logs = [tmp_path / "logs" / f"seed_{i}.log" for i in range(2)]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    sweep.send_signal(number)
    assert sweep.wait(timeout=30) != 0
    assert not any(psutil.pid_exists(int(log.read_text())) for log in logs)  # not left behind
    outcomes = run_sweep(sweep_points(Sweep("demo", seeds=2)), command(), tmp_path, jobs=2)
    assert all(o.finished for o in outcomes.values())


def test_a_sweep_is_a_cluster_s_array_job_too(tmp_path):
    pytest.importorskip("submitit")
    points = sweep_points(Sweep("demo", seeds=2))
    outcomes = submit_sweep(points, command(), tmp_path, "local", 1, {})
    assert all(o.finished for o in outcomes.values())
    assert started(tmp_path) == ["seed_0", "seed_1"]
    assert submit_sweep(points, command(), tmp_path, "local", 1, {}) == outcomes
    assert started(tmp_path) == ["seed_0", "seed_1"]
    with pytest.raises(UserError, match="--option"):
        submit_sweep(points, command(), tmp_path, "local", 1, {"no_such_option": 1})
    with pytest.raises(UserError, match=r"--option.*timeout_min"):
        submit_sweep(points, command(), tmp_path, "local", 1, {"timeout_min": "long"})


def test_a_damaged_record_and_a_busy_folder_are_said(tmp_path):
    points = sweep_points(Sweep("demo"))
    (tmp_path / "sweep.json").write_text('{"run": ')
    with pytest.raises(UserError, match=r"sweep\.json: damaged"):
        run_sweep(points, command(), tmp_path, jobs=1)


def test_the_other_seeds_may_be_of_the_best_settings_alone():
    points = sweep_points(replace(SWEEP, seeds=3, seeds_of="best"))
    first = [p.name for p in points if p.seed == 0]
    assert first == ["ft-lr_0.001-seed_0", "ft-lr_0.002-seed_0", "migu-seed_0"]
    best = of_the_best(points, dict(zip(first, (0.5, 0.7, 0.1), strict=True)))
    assert [p.name for p in best] == [
        f"{setting}-seed_{seed}" for seed in range(3) for setting in ("ft-lr_0.002", "migu")
    ]
    with pytest.raises(UserError, match="without several seeds"):
        sweep_points(replace(SWEEP, seeds=1, seeds_of="best"))


MEASURED = """
import pathlib, sys
from tests.fake_runs import fake_run
runs = pathlib.Path(sys.argv[sys.argv.index("--runs") + 1])
given = dict(x.split("=") for x in sys.argv if "=" in x)
fake_run(
    runs / given["name"], enabled="mask.enabled" not in given,
    lr=float(given["optimizer.lr"]), seed=int(given["seed"]), steps=3,
)
"""


def test_the_command_chooses_by_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "pipeline.run.sweep_runs.program", lambda _: [sys.executable, "-c", MEASURED]
    )
    file = tmp_path / "rates.yaml"
    file.write_text(json.dumps({"recipe": "demo", "methods": SWEEP.methods, "seeds": 2}))
    given = ["sweep.py", "--recipe", str(file), "--grid", "optimizer.lr=1e-6,1e-3"]
    given += ["--seeds-of", "best", "--runs", str(tmp_path), "--jobs", "2"]
    dry = [sys.executable, ROOT / "launch/sweep.py", *given[1:], "--dry-run"]
    listed = subprocess.run(dry, capture_output=True, text=True, check=True).stdout
    assert "then the seeds 1 to 1 of the best setting of each method" in listed
    monkeypatch.setattr(sys, "argv", given)
    main()
    said = capsys.readouterr().out
    assert "best of ft: ft-lr_0.001-seed_0" in said
    assert "best of migu: migu-lr_0.001-seed_0" in said
    folder = tmp_path / "rates_sweep"
    assert sorted(p.name for p in folder.glob("*seed*")) == [
        f"{method}-{setting}" for method in ("ft", "migu")
        for setting in ("lr_0.001-seed_0", "lr_0.001-seed_1", "lr_1e-06-seed_0")
    ]  # fmt: skip
    assert (folder / "comparison/index.html").is_file()


def test_a_sweep_lies_over_its_base(tmp_path):
    rates = {"recipe": "demo", "methods": {"ft": {"mask.enabled": False}, "migu": {}}}
    (tmp_path / "rates.yaml").write_text(json.dumps({**rates, "grid": {"optimizer.lr": [1, 2]}}))
    more = {"base": "rates.yaml", "grid": {"seed": [1, 2]}, "grids": {"ft": {"optimizer.lr": [2]}}}
    (tmp_path / "seeds.yaml").write_text(json.dumps(more))
    sweep = load_sweep(str(tmp_path / "seeds.yaml"))
    assert sweep.recipe == "demo"
    assert [p.name for p in sweep_points(sweep)] == [
        "ft-seed_1", "ft-seed_2",
        *(f"migu-lr_{lr}-seed_{seed}" for lr in (1, 2) for seed in (1, 2)),
    ]  # fmt: skip
    assert sweep_points(sweep)[0].overrides == ("mask.enabled=false", "optimizer.lr=2", "seed=1")
    (tmp_path / "one.yaml").write_text("base: seeds.yaml\nmethods: {ft: null}\n")
    left = sweep_points(load_sweep(str(tmp_path / "one.yaml")))
    assert {p.method for p in left} == {"migu"}


def test_runs_of_a_recipe_that_has_changed_since_are_refused(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: demo\nname: mine\n")
    sweep = Sweep(str(recipe), grid={"optimizer.lr": [0.1]})
    [point] = points = sweep_points(sweep)
    begun = load_recipe(str(recipe), [*point.overrides, f"name={point.name}"])
    with open_run(tmp_path / point.name, begun, {}):
        pass
    recipe.write_text("base: demo\nname: mine\nseed: 2\n")
    require_same_runs(sweep, points, tmp_path)  # nothing of it is measured yet
    recipe.write_text("base: demo\nname: mine\n")
    (tmp_path / point.name / "stages").mkdir()
    require_same_runs(sweep, points, tmp_path)
    recipe.write_text("base: demo\nname: mine\nseed: 3\n")
    with pytest.raises(UserError, match=r"another recipe \(seed: 0 there, 3 now\)"):
        require_same_runs(sweep, points, tmp_path)


def test_sweeps_are_checked(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        json.dumps({"recipe": "demo", "grids": {"fft": {"seed": [1]}}, "methods": {"ft": {}}})
    )
    with pytest.raises(UserError, match=r"grids\.fft: no such method; did you mean 'ft'"):
        load_sweep(str(file))
    file.write_text(json.dumps({"recipe": "demo", "seed": 1}))
    with pytest.raises(UserError, match="seed"):
        load_sweep(str(file))
    file.write_text("name: a recipe\n")
    assert load_sweep(str(file)) is None
    file.write_text("base: demo\nname: a recipe over another\n")
    assert load_sweep(str(file)) is None
    with pytest.raises(UserError, match="empty"):
        sweep_points(Sweep("demo", grid={"optimizer.lr": []}))
    with pytest.raises(UserError, match=r"a run named '\.\./x', which names files"):
        sweep_points(Sweep("demo", methods={"../x": {}}))
    with pytest.raises(UserError, match="--seeds: has no effect"):
        sweep_points(Sweep("demo", grid={"seed": [4, 5]}, seeds=2))
    given = [p.overrides for p in sweep_points(Sweep("demo", grid={"seed": [4, 5]}))]
    assert given == [("seed=4",), ("seed=5",)]
    assert sweep_points(Sweep("demo"))[0].overrides == ()  # the recipe's own seed


def with_files(recipe, overrides):
    """Read a recipe whose data is elsewhere: empty files in its place."""
    try:
        load_recipe(recipe, overrides)
    except UserError as error:
        missing = re.findall(r"no such file: (\S+)", str(error))
        if not missing:
            raise
        for path in map(Path, missing):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        load_recipe(recipe, overrides)


def test_every_run_of_every_sweep_resolves(tmp_path, monkeypatch):
    write_cl_benchmark(tmp_path)
    monkeypatch.setenv("CL_BENCHMARK", str(tmp_path))
    monkeypatch.setenv("MIGU_DATA", str(tmp_path))
    names = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    assert len(names) > 10
    for name in names:
        sweep = load_sweep(name)
        recipe = find_recipe(sweep.recipe)
        for point in sweep_points(sweep):
            if point.seed == 0:
                with_files(recipe, list(point.overrides))


def test_as_many_runs_at_a_time_as_cores_and_memory_take():
    assert jobs_at_once(0, threads=1, gpus=4) == 4
    assert jobs_at_once(1 << 60, threads=1, gpus=0) == 1
    assert jobs_at_once(0, threads=1, gpus=0) <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("optimizer.lr=5", "the grid varies it"),
        ("optimizer={lr: 5}", "the grid varies it"),
        ("mask.enabled=false", "the methods differ in it"),
        ("mask={enabled: false}", "the methods differ in it"),
        ("seed=7", "the seeds are 0 to N-1"),
        ("name=x", "named by what it varies"),
    ],
)
def test_a_setting_of_all_runs_that_would_make_them_alike_is_refused(setting, reason):
    methods = {"ft": {"mask.enabled": False}, "migu": {}}
    sweep = Sweep("demo", methods, grid={"optimizer.lr": [1, 2]}, seeds=2)
    with pytest.raises(UserError, match=f"{re.escape(setting)}: would make .*{reason}"):
        sweep_points(sweep, [setting])
    once = Sweep("demo", methods, grid={"optimizer.lr": [1]}, grids={"ft": {"mask.seed": [1]}})
    assert sweep_points(once, ["optimizer.lr=2"])[0].overrides[-1] == "optimizer.lr=2"
    points = sweep_points(sweep, ["train.batch_size=4"])
    assert all(p.overrides[-1] == "train.batch_size=4" for p in points)


def test_options_are_of_the_type_that_they_look_like():
    given = {"240": 240, "true": True, "gpu": "gpu", "12:00:00": "12:00:00", "007": "007"}
    assert {text: _typed(text) for text in given} == given
