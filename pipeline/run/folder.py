"""The folder of a run: who may write it, and what it says about itself (docs/runs.md)."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from pipeline.checkpoint import is_published, replace_file
from pipeline.engine.config import describe, precision_of
from pipeline.errors import UserError, advice
from pipeline.migu.targets import count_rows
from pipeline.progress import now
from pipeline.ranks import on_rank0, rank, world_size
from pipeline.recipe import Recipe
from pipeline.redact import redacted
from pipeline.run.base_files import FILE as BASE
from pipeline.run.base_files import KEYS, base_differences, base_files
from pipeline.run.lock import FolderLock
from pipeline.run.recipe_defaults import with_defaults
from pipeline.run.stage_rows import masked_targets

MARK = "environment.json"  # the first file of a run folder, and the last that is deleted
RESUME = "resume"  # in a stage's folder, while it trains: checkpoints behind a step
CORPORA = "corpora.json"  # what the run has read
MASTERS = "masters"  # beside the newest checkpoint: its trained weights in fp32
LONGEST = 120  # letters of a stage's name in its folder's
PACKAGES = ("migu", "torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy",
            "safetensors")  # fmt: skip


# They change how something is computed, not what: a run may be continued with other values.
FREE = {
    "track", "train.micro_batch_size", "evaluate.batch_size", "evaluate.benchmark_files",
    "evaluate.unreachable", "evaluate.humaneval.batch_size", "evaluate.humaneval.sandbox",
    "evaluate.end_tasks.files", "evaluate.end_tasks.processes",
    "train.compare_replicas", "bad_steps.policy", "bad_steps.budget", "bad_steps.spike",
    "bad_steps.window", "data.prepared",
}  # fmt: skip
PLACES = (".files", ".heldout_files", ".task.labels")  # of a domain, which may have moved


def stage_folder(run: Path, stage: int, name: str) -> Path:
    return run / "stages" / f"{stage:02d}_{_short(name)}"


def _short(name: str) -> str:
    """A name that every file system takes; the whole one is in the recipe and the results."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def step_folder(stage: Path, step: int) -> Path:
    """Of a checkpoint within a stage."""
    return stage / f"step-{step:06d}"


@contextmanager
def open_run(folder: Path, recipe: Recipe, engine_config: dict[str, Any]) -> Iterator[FolderLock]:
    """Hold the run folder's lock, which is given, and write what the run is. All ranks enter;
    rank 0 does it.

    Raises:
        UserError: another process holds the folder, or it is another recipe's.
    """
    lock = FolderLock(folder)
    on_rank0(lambda: _claim(folder, lock, recipe, engine_config))
    try:
        yield lock
    finally:
        if rank() == 0:
            lock.release()


def _claim(folder: Path, lock: FolderLock, recipe: Recipe, engine_config: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        help_ = advice(error) or "Choose another with --runs or name=..."
        raise UserError(f"cannot make the run folder {folder}: {error}. {help_}.") from None
    lock.acquire()
    try:
        _fill(folder, recipe, engine_config)
    except BaseException:
        lock.release()
        raise


def _fill(folder: Path, recipe: Recipe, engine_config: dict[str, Any]) -> None:
    """Write what the run is. Raises UserError: the folder is another recipe's, or read-only."""
    _require_writable(folder)
    _require_run(folder)
    stored = folder / "recipe.yaml"
    if not (folder / "stages").exists():  # nothing measured yet: an attempt that failed early
        for leftover in ("tokenizer", "heldout"):
            shutil.rmtree(folder / leftover, ignore_errors=True)
    require_same(folder, recipe)
    if stored.is_file() and _is_trained(folder, recipe):
        return  # how that was done stays as it is
    engine_file = "fsdp.json" if recipe.engine.kind == "fsdp" else "ds_config.json"
    for name, content in (
        (MARK, redacted(_environment(engine_config))),
        (engine_file, redacted(engine_config)),
        (BASE, base_files(recipe.model)),
    ):
        replace_file(folder / name, json.dumps(content, indent=2) + "\n")
    replace_file(stored, recipe.to_yaml())


def require_same(folder: Path, recipe: Recipe) -> None:
    """Raises UserError where what a folder has measured or trained is another recipe's."""
    stored = folder / "recipe.yaml"
    if not (stored.is_file() and (folder / "stages").exists()):
        return
    before: Any = OmegaConf.load(stored)
    now = OmegaConf.create(recipe.to_yaml())
    present = base_files(recipe.model)
    base = base_differences(folder, before.get("model") or {}, recipe.model, present)
    known = recipe.data.prepare and (folder / CORPORA).is_file()  # `open_corpora` compares them
    if different := (base + _differences(before, now, PLACES if known else ()))[:5]:
        raise UserError(
            f"{folder} holds a run of another recipe ({'; '.join(different)}). Give this run a "
            "name of its own (name=...), or delete the old one with --restart."
        )


def _is_trained(folder: Path, recipe: Recipe) -> bool:
    stages = enumerate(recipe.stages, start=1)
    return all(is_published(stage_folder(folder, i, s.name) / "checkpoint") for i, s in stages)


def _require_run(folder: Path) -> None:
    """Raises UserError where a folder has something in it and is not a run's."""
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and not (folder / MARK).is_file():
        raise UserError(
            f"{folder} is not a run folder, it holds {others[0]}. Give the run another place "
            "(--runs) or name (name=...), or delete that by hand."
        )


def _require_writable(folder: Path) -> None:
    """Raises UserError where a file cannot be written into the folder or what it has of the run."""
    for place in (folder, folder / "stages", folder / "report"):
        probe = place / ".writable"
        try:
            if place.is_dir():
                probe.write_bytes(b"1")
                probe.unlink()
        except OSError as error:
            help_ = advice(error) or "Choose another folder with --runs"
            raise UserError(f"cannot write into {place}: {error}. {help_}.") from None


def restart(runs: Path, recipe: Recipe) -> None:
    """Delete the folder of an earlier run of this name (not while another process uses it)."""
    folder = runs / recipe.name
    if not folder.exists():
        return
    _require_run(folder)
    lock = FolderLock(folder)
    lock.acquire()
    try:
        # The lock is open: on NFS its file would stay under another name, and the folder with it.
        for path in folder.iterdir():
            if path.name == MARK or path.name.startswith(".lock"):
                continue  # what says that the folder is a run's goes last
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / MARK).unlink()
    except OSError as error:
        raise UserError(f"--restart: cannot delete {folder}: {error}") from None
    finally:
        lock.release()
    shutil.rmtree(folder, ignore_errors=True)


def _differences(old: Any, new: Any, places: tuple[str, ...] = ()) -> list[str]:
    """Keys whose values differ, but for FREE ones, the engine, the base (`base_differences`), and
    domains' `places`. A key that the version of `old` did not know has its default."""

    def flat(node: Any, path: str = "") -> dict[str, Any]:
        inner: dict[str, Any] = {}
        if isinstance(node, dict):
            inner = {f"{path}.{key}": n for key, n in node.items()}
        elif isinstance(node, list) and all(isinstance(n, dict) for n in node):  # the stages
            inner = {f"{path}[{i}]": n for i, n in enumerate(node)}
        if inner:  # an empty one is a setting too: `hft: {}`
            return {k: v for key, n in inner.items() for k, v in flat(n, key).items()}
        return {path.lstrip("."): node}

    then: Any = OmegaConf.to_container(old)
    a, b = flat(with_defaults(then)), flat(OmegaConf.to_container(new))
    return [
        f"{key}: {a.get(key)!r} there, {b.get(key)!r} now"
        for key in sorted({*a, *b} - FREE - {f"model.{k}" for k in KEYS})
        if a.get(key) != b.get(key) and not key.startswith(("engine.", "resume"))
        if not (key.startswith("data.domains.") and key.endswith(places))
    ]


def _environment(engine_config: dict[str, Any]) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    return {
        "started": now(),
        "command": " ".join(sys.argv),
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain")) if commit else False,
        "versions": versions,
        "hardware": {
            "device": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        },
        "ranks": world_size(),
        "engine": describe(engine_config),
        "precision": precision_of(engine_config),
    }


def _git(*arguments: str) -> str | None:
    """Output of git in this project's own checkout; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=here,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_model(folder: Path, recipe: Recipe, model: nn.Module) -> None:
    """Add to environment.json what the model without its weights tells.

    Raises:
        UserError: as `masked_targets`.
    """
    known = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    known["model"] = type(model).__name__
    known["parameters"] = sum(p.numel() for p in model.parameters())
    if recipe.mask.enabled:
        k = recipe.mask
        counts = count_rows(masked_targets(model, k), k.threshold, k.rule)
        known["masked_linears"] = sum(c["linears"] for c in counts.values())
        known["masked_rows"] = {
            "total": sum(c["rows"] for c in counts.values()),
            "kept": sum(c["kept"] for c in counts.values()),
        }
    (folder / "environment.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
