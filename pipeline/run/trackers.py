"""The numbers of a run for TensorBoard, Weights & Biases, MLflow and Trackio (`track` in a recipe).

Rank 0 opens them, so they are the same under every engine. Each stage has charts of its own, over
its steps; what was evaluated is over the stages. Where a run is continued, so is what it tracked:
`trackers.json` in its folder names it. A tracker that fails is told once and left out; training
does not depend on it. Where they send to is set as each library documents it (WANDB_PROJECT,
MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...).
"""

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipeline.checkpoint import replace_file
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.recipe import Recipe
from pipeline.redact import redact, redacted

PROJECT = "migu"  # unless the library's own variable names another
STEP = ("loss", "grad_norm", "lr", "kept", "seconds")  # of a step's line in the log
NAMES = {"grad_norm": "gradient_norm", "kept": "kept_rows", "seconds": "step_seconds"}
MODULES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio", "trackio"),
}


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int, axis: str) -> None:
        """`axis` names what `step` counts, for libraries that keep one count for all charts."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a library is missing; before any training."""
    missing = [name for name in names if find_spec(MODULES[name][0]) is None]
    if missing:
        packages = " ".join(MODULES[name][1] for name in missing)
        raise UserError(
            f"track: {' and '.join(missing)} cannot be imported; pip install {packages}, or take "
            "it out of the recipe"
        )


class Trackers:
    """Those of a run; with none named, everything here does nothing."""

    def __init__(self, recipe: Recipe, folder: Path):
        self._open: dict[str, Tracker] = {}
        known = _read(folder / "trackers.json")
        for name in recipe.track:
            self._guarded(name, partial(self._start, name, recipe, folder, known))
        if known:
            replace_file(folder / "trackers.json", json.dumps(known, indent=1) + "\n")

    def step(self, record: Mapping[str, Any]) -> None:
        """A step, as it is written into the log."""
        if not self._open:
            return
        prefix = f"stage_{record['stage']:02d}_{record['domain']}"
        values = {f"{prefix}/{NAMES.get(k, k)}": record.get(k) for k in STEP}
        for domain, numbers in (record.get("domains") or {}).items():
            values[f"{prefix}/loss_on_{domain}"] = numbers.get("loss")
        self._log(values, record["step"], f"{prefix}/step")

    def evaluated(self, stage: int, folder: Path) -> None:
        """The results in the folder of a stage."""
        if not self._open:
            return
        values: dict[str, Any] = {}
        for domain, result in (_read(folder / "eval.json").get("domains") or {}).items():
            values[f"heldout/{domain}"] = result.get("loss")
        benchmarks = _read(folder / "benchmarks.json").get("benchmarks") or {}
        values |= {f"benchmarks/{name}": result.get("value") for name, result in benchmarks.items()}
        greedy = _read(folder / "humaneval.json").get("greedy") or {}
        values |= {f"humaneval/{name}": value for name, value in greedy.items() if "@" in name}
        self._log(values, stage, "stage")

    def close(self) -> None:
        for name in list(self._open):
            self._guarded(name, self._open[name].close)
        self._open.clear()

    def _start(self, name: str, recipe: Recipe, folder: Path, known: dict[str, Any]) -> None:
        tracker = STARTS[name](recipe, folder, known.get(name))
        self._open[name] = tracker
        if identity := getattr(tracker, "identity", None):
            known[name] = identity

    def _log(self, values: dict[str, Any], step: int, axis: str) -> None:
        numbers = {
            k: float(v)
            for k, v in values.items()
            if isinstance(v, int | float) and math.isfinite(v)
        }
        for name in list(self._open) if numbers else ():
            tracker = self._open[name]
            self._guarded(name, partial(tracker.log, numbers, step, axis))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of a network, a server, a full disk
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"track: {name} failed and is left out from here on: {reason}")


class _TensorBoard:
    def __init__(self, recipe: Recipe, folder: Path, identity: str | None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text(
            "recipe", "    " + redact(recipe.to_yaml()).replace("\n", "\n    "), 0
        )

    def log(self, values: dict[str, float], step: int, axis: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, recipe: Recipe, folder: Path, identity: str | None):
        import wandb

        self.identity = identity or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=recipe.name,
            id=self.identity,
            resume="allow",
            dir=str(folder),
            config=redacted(dataclasses.asdict(recipe)),
        )
        self._axes: set[str] = set()

    def log(self, values: dict[str, float], step: int, axis: str) -> None:
        # Its own count only grows; a stage that is trained again counts from 1 again.
        if axis not in self._axes:
            self._axes.add(axis)
            self._run.define_metric(axis)
            for group in {name.split("/")[0] for name in values}:
                self._run.define_metric(f"{group}/*", step_metric=axis)
        self._run.log({**values, axis: step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, recipe: Recipe, folder: Path, identity: str | None):
        # Without a database library its default fails, and it asks to be told twice about folders.
        os.environ.setdefault("MLFLOW_TRACKING_URI", Path("mlruns").resolve().as_uri())
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=identity, run_name=recipe.name)
        self.identity = run.info.run_id
        if identity is None:
            mlflow.log_dict(redacted(dataclasses.asdict(recipe)), "recipe.json")

    def log(self, values: dict[str, float], step: int, axis: str) -> None:
        named = {name.replace("@", "_at_").replace("+", "_"): v for name, v in values.items()}
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, recipe: Recipe, folder: Path, identity: str | None):
        import trackio

        self.identity = recipe.name
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.identity,
            resume="allow",
            config=redacted(dataclasses.asdict(recipe)),
        )

    def log(self, values: dict[str, float], step: int, axis: str) -> None:
        self._run.log({**values, axis: step}, step=step)

    def close(self) -> None:
        self._run.finish()


STARTS: dict[str, Callable[[Recipe, Path, str | None], Tracker]] = {
    "tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio,
}  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
