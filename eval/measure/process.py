"""Evaluate a published checkpoint in processes of its own: one per rank, each on its share."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from eval.measure.checkpoint import merge
from pipeline.ranks import on_rank0, rank, total, world_size
from pipeline.recipe import Recipe
from pipeline.run.run import Evaluation

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "evaluate.py"
# What a launcher sets for its ranks; the evaluation is not one of them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def evaluate_in_processes(task: Evaluation, recipe: Recipe, kinds: list[str]) -> None:
    """Called by every rank; rank 0 merges the shares of each kind into a file in `task.folder`.

    Raises:
        RuntimeError: something could not be measured (on every rank alike); the rest is there.
    """
    folder = task.folder
    on_rank0(partial(_prepare, folder))
    command = [sys.executable, str(SCRIPT), *_arguments(task, recipe, kinds)]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        command += ["--device", str(device)]
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    subprocess.run(command, env=environment)  # what it could not do, it writes down
    _done(folder, rank()).touch()
    while not all(_done(folder, r).exists() for r in range(world_size())):
        time.sleep(0.1)  # not in a collective: its timeout is shorter than a long evaluation
    total(0.0, device)  # every rank has seen every file
    heldout, threshold = task.run / "heldout", recipe.mask.threshold
    failed = on_rank0(
        partial(
            merge, folder, kinds, world_size(), recipe.evaluate, heldout, threshold, task.describe()
        )
    )
    on_rank0(partial(_clear, folder))
    if failed:
        raise RuntimeError("; ".join(failed))


def _arguments(task: Evaluation, recipe: Recipe, kinds: list[str]) -> list[str]:
    arguments = {
        "--checkpoint": task.checkpoint,
        "--revision": task.revision,
        "--tokenizer": recipe.model.tokenizer if task.stage == 0 else None,
        "--recipe": str(task.run / "recipe.yaml"),
        "--heldout": str(task.run / "heldout"),
        "--output": str(task.folder),
        "--share": f"{rank()}/{world_size()}",
        "--attention": recipe.model.attention,
    }
    given = [x for name, value in arguments.items() if value for x in (name, value)]
    return [*given, "--tasks", *kinds]


def _prepare(folder: Path) -> None:
    """An empty place for the shares: those of a broken attempt may be of another number."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)


def _clear(folder: Path) -> None:
    for leftover in folder.glob("share-*"):
        leftover.unlink()


def _done(folder: Path, of: int) -> Path:
    return folder / f"share-{of}.done"
