"""Evaluate a published checkpoint in processes of its own: one per rank, each on its share."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from eval.lm import merge_shares
from pipeline.ranks import on_rank0, rank, total, world_size
from pipeline.recipe import Recipe
from pipeline.run import Evaluation

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "evaluate.py"
# What a launcher sets for its ranks; the evaluation is not one of them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def evaluate_in_processes(task: Evaluation, recipe: Recipe) -> None:
    """Called by every rank; rank 0 merges the shares into `task.result`.

    Raises:
        RuntimeError: a share failed (on every rank alike).
    """
    started = time.time()
    folder = task.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"share-{r}.npz" for r in range(world_size())]
    command = [
        sys.executable,
        str(SCRIPT),
        "--checkpoint",
        task.checkpoint,
        "--heldout",
        str(task.run / "heldout"),
        "--output",
        str(parts[rank()]),
        "--share",
        f"{rank()}/{world_size()}",
        "--batch-size",
        str(recipe.evaluate.batch_size),
        "--attention",
        recipe.model.attention,
    ]
    if task.revision:
        command += ["--revision", task.revision]
    if not recipe.evaluate.overlap:
        command.append("--no-overlap")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        command += ["--device", str(device)]
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    code = subprocess.run(command, env=environment).returncode
    failures = total(float(code != 0), device)
    if failures:
        raise RuntimeError(f"{failures:.0f} of {world_size()} evaluation processes failed")
    info = {
        "stage": task.stage,
        "name": task.name,
        "checkpoint": task.checkpoint,
        "started": started,
    }
    on_rank0(
        lambda: merge_shares(parts, task.run / "heldout", task.result, recipe.mask.threshold, info)
    )
