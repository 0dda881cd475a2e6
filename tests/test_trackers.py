"""A run's numbers reach TensorBoard, W&B, MLflow and Trackio; nothing of theirs ends a run."""

import importlib.machinery
import json
import sys
import types

import pytest

from pipeline.errors import UserError
from pipeline.progress import EventLog
from pipeline.recipe import Data, Model, Recipe, Stage
from pipeline.run import trackers
from pipeline.run.trackers import Trackers, check_trackers

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


@pytest.mark.parametrize("name", ["tensorboard"])
def test_steps_and_results_are_tracked(tmp_path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    a_run(tmp_path, name)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert read["stage_01_a/loss"] == [(1, 5.0), (2, 2.5)]
    assert read["stage_02_b/loss_on_a"] == [(1, 2.5), (2, 1.25)]
    assert read["heldout/prose"] == [(1, 5.0), (2, 6.0)]
    assert [step for step, _ in read["benchmarks/piqa"]] == [1, 2]
    assert not any("gradient_norm" in tag for tag in read)  # NaN is no number to draw


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
