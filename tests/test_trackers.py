"""A run's numbers reach TensorBoard, W&B, MLflow and Trackio; nothing of theirs ends a run."""

import importlib.machinery
import json
import os
import struct
import sys
import types
from collections import defaultdict
from importlib.util import find_spec

import pytest

from pipeline.errors import UserError
from pipeline.progress import EventLog, StageProgress
from pipeline.recipe import Data, Model, Recipe, Stage
from pipeline.run import trackers
from pipeline.run.trackers import Trackers, check_trackers
from tests.spawn import run_ranks
from tests.test_nodes import write_recipe

NAMES = ("tensorboard", "wandb", "mlflow", "trackio")


def recipe(*names):
    stages = [Stage("a", steps=2), Stage("b", steps=2)]
    return Recipe("demo", Model(path="gpt2"), Data(), stages, track=list(names))


@pytest.fixture
def library(request, monkeypatch):
    """The name of a tracker whose library is a false one that notes what it is given."""
    seen = []

    def note(name):
        def noted(*args, **kwargs):
            seen.append((name, args, kwargs))
            return types.SimpleNamespace(
                log=note("log"), define_metric=note("define_metric"), finish=note("close"),
                info=types.SimpleNamespace(run_id="of mlflow"),
            )  # fmt: skip

        return noted

    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    names = {"init": "start", "start_run": "start", "log_metrics": "log", "end_run": "close",
             "set_experiment": "experiment", "log_dict": "recipe"}  # fmt: skip
    for function, name in names.items():
        setattr(module, function, note(name))
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, seen


def a_run(folder, *names):
    """Two stages as a run logs them."""
    log = EventLog(folder / "log.jsonl", Trackers(recipe(*names), folder))
    for stage, domain in ((1, "a"), (2, "b")):
        for step in (1, 2):
            loss = 5.0 / stage / step
            log.write("step", stage=stage, domain=domain, step=step, steps=2, loss=loss,
                      grad_norm=float("nan"), lr=1e-3, kept=0.3, tokens=64, seconds=0.1,
                      domains={"a": {"loss": loss, "tokens": 64}})  # fmt: skip
        place = folder / f"{stage}"
        place.mkdir(exist_ok=True)
        results = {"domains": {"prose": {"loss": 4.0 + stage}}}
        (place / "eval.json").write_text(json.dumps(results))
        results = {"benchmarks": {"piqa": {"value": 0.5 + stage / 10, "stderr": 0.1}}}
        (place / "benchmarks.json").write_text(json.dumps(results))
        log.evaluated(stage, place)
    log.close()


def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}  # fmt: skip


def of_wandb(folder):
    """From its own files: records in blocks of 32 KB, each with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    read = defaultdict(list)
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (room := 32768 - at % 32768) < 7:
                at += room
                continue
            length, kind = struct.unpack_from("<HB", data, at + 4)
            parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (2, 3):  # its first, a middle part
                continue
            items = Record.FromString(parts).history.item
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            parts = b""
            for name in values:
                axis = f"{name.split('/')[0]}/step" if name.startswith("stage_") else "stage"
                if name[0] != "_" and name != axis:
                    read[name].append((values[axis], values[name]))
    return read


def of_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'migu'")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: sorted((m.step, m.value) for m in found) for name, found in history.items()}


def of_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    read = defaultdict(list)
    for record in SQLiteStorage.get_logs("migu", "demo"):
        for name in set(record) - {"step", "timestamp", "stage"}:
            read[name].append((record["step"], record[name]))
    return read


READ = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


@pytest.fixture
def installed(request, tmp_path, monkeypatch):
    """The name of a tracker that is installed, which is to send nothing anywhere."""
    pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):  # they are set by a run
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return request.param


@pytest.mark.parametrize("installed", NAMES, indirect=True)
def test_steps_and_results_are_tracked(tmp_path, installed):
    a_run(tmp_path, installed)
    read = READ[installed](tmp_path)
    assert read["stage_01_a/loss"] == [(1, 5.0), (2, 2.5)]
    assert read["stage_02_b/loss_on_a"] == [(1, 2.5), (2, 1.25)]
    assert read["heldout/prose"] == [(1, 5.0), (2, 6.0)]
    assert [step for step, _ in read["benchmarks/piqa"]] == [1, 2]
    assert not any("gradient_norm" in tag for tag in read)  # NaN is no number to draw


def train(recipe, folder):
    """With every tracker that is installed."""
    from pipeline import ranks
    from pipeline.engine.config import resolve_engine_config
    from pipeline.run.recipe_file import load_recipe
    from pipeline.run.run import run_recipe

    names = [name for name in NAMES if find_spec(name)]
    for kind in ("deepspeed", "fsdp"):
        given = [f"name={kind}", f"engine.kind={kind}", f"track=[{','.join(names)}]"]
        loaded = load_recipe(recipe, given)
        config = resolve_engine_config(None, loaded, ranks.world_size(), "cpu")
        run_recipe(loaded, config, folder, lambda *_: {}, lambda *_: None, lambda run: run)


@pytest.mark.skipif(not os.environ.get("RUN_EVERYTHING"), reason="trains under two engines")
def test_every_engine_is_tracked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for reading; a run sets it itself
    run_ranks(train, 2, write_recipe(tmp_path), tmp_path)
    for kind in ("deepspeed", "fsdp"):
        log = [json.loads(line) for line in (tmp_path / kind / "log.jsonl").open()]
        losses = [(r["step"], pytest.approx(r["loss"])) for r in log if r["event"] == "step"]
        assert len(losses) == 2
        for name in filter(find_spec, ("tensorboard", "wandb")):
            assert READ[name](tmp_path / kind)["stage_01_a/loss"] == losses
        if find_spec("trackio"):
            from trackio.sqlite_storage import SQLiteStorage

            seen = [r for r in SQLiteStorage.get_logs("migu", kind) if "stage_01_a/loss" in r]
            assert [(r["step"], r["stage_01_a/loss"]) for r in seen] == losses
        if find_spec("mlflow"):
            from mlflow.tracking import MlflowClient

            client = MlflowClient((tmp_path / "mlruns").as_uri())
            everywhere = [e.experiment_id for e in client.search_experiments()]
            (run,) = client.search_runs(everywhere, f"attributes.run_name = '{kind}'")
            found = client.get_metric_history(run.info.run_id, "stage_01_a/loss")
            assert sorted((m.step, m.value) for m in found) == losses


@pytest.mark.parametrize("library", NAMES[1:], indirect=True)
def test_each_library_gets_every_number_and_goes_on_with_its_run(tmp_path, library):
    name, seen = library
    a_run(tmp_path, name)
    logged = [{**args[0], **kwargs} for what, args, kwargs in seen if what == "log"]
    losses = [values["stage_02_b/loss"] for values in logged if "stage_02_b/loss" in values]
    assert losses == [2.5, 1.25]
    assert [v["heldout/prose"] for v in logged if "heldout/prose" in v] == [5.0, 6.0]
    assert [what for what, *_ in seen].count("close") == 1
    a_run(tmp_path, name)  # continued
    (_, _, first), (_, _, second) = [call for call in seen if call[0] == "start"]
    identity = {"wandb": "id", "mlflow": "run_id", "trackio": "name"}[name]
    assert second[identity] == (first[identity] or "of mlflow")
    if name == "wandb":
        axes = {a[0]: k.get("step_metric") for what, a, k in seen if what == "define_metric"}
        assert axes["stage_02_b/*"] == "stage_02_b/step"


@pytest.mark.parametrize("broken", ["start", "log", "close"])
@pytest.mark.parametrize("library", ["trackio"], indirect=True)
def test_a_tracker_that_fails_is_told_once_and_ends_nothing(
    tmp_path, library, broken, monkeypatch, capsys
):
    def fails(*_, **__):
        raise ConnectionError("the server is away")

    place, name = (
        (trackers._Trackio, broken) if broken != "start" else (sys.modules["trackio"], "init")
    )
    monkeypatch.setattr(place, name, fails)
    a_run(tmp_path, "trackio", "tensorboard")
    said = capsys.readouterr().out
    assert said.count("trackio failed and is left out from here on: the server is away") == 1
    assert (tmp_path / "tensorboard").exists()


def test_a_missing_library_is_one_message(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name != "tensorboard" else 1)
    check_trackers(["tensorboard"])
    with pytest.raises(UserError, match="pip install wandb mlflow-skinny"):
        check_trackers(["wandb", "tensorboard", "mlflow"])


def test_nothing_is_tracked_unless_named(tmp_path):
    a_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "1", "2"}


@pytest.mark.parametrize(
    ("longest", "lines"), [(60.0, [6, *range(10, 101, 10)]), (0.0, range(6, 101))]
)
def test_without_a_terminal_a_stage_is_never_silent_for_long(capsys, monkeypatch, longest, lines):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    progress = StageProgress("stage", 100, behind=5, seconds=longest)
    fast = {"tokens_per_second": 40.0, "tflops": 1.0, "peak_memory_gb": 1.0}
    for step in range(6, 101):
        progress.update(step, 8, 1.0, 1.0, 1.0, fast)
    said = capsys.readouterr().out.splitlines()
    assert "tok/s 40 " in said[-1]  # whatever is between the steps
    assert [line.split("  ")[1] for line in said] == [f"step {n}/100" for n in lines]
