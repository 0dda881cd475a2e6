"""Evaluate a published checkpoint in processes of its own: one per rank, each on its share.

Only the ranks that see the run folder of rank 0 take part: the checkpoint lies there. What they
measured reaches rank 0 through the process group, so no file has to be seen by another machine.
"""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from eval.measure.checkpoint import failure, merge, part
from pipeline import heartbeat, signals
from pipeline.nodes import first_beside
from pipeline.ranks import gather, meet, on_rank0, rank
from pipeline.recipe import Recipe
from pipeline.run.evaluation import Evaluation

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "evaluate.py"
# What a launcher sets for its ranks; the evaluation is not one of them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

Files = dict[str, bytes]  # by name


def evaluate_in_processes(task: Evaluation, recipe: Recipe, kinds: list[str]) -> None:
    """Called by every rank; rank 0 merges the shares of each kind into a file in `task.folder`.

    Raises:
        RuntimeError: something could not be measured (on every rank alike); the rest is there.
        TrainingStopped: a rank is gone.
    """
    on_rank0(partial(_prepare, task.folder))
    near = [r for r, first in enumerate(first_beside(task.run)) if first == 0]
    files: Files = {}
    if rank() in near:
        files = _measure(task, recipe, kinds, near.index(rank()), len(near))
    meet()  # not in a collective: its timeout is shorter than a long evaluation
    shares = gather(files)

    def merge_shares() -> list[str]:
        for name, content in (f for share in shares for f in share.items()):
            (task.folder / name).write_bytes(content)
        heldout, threshold = task.run / "heldout", recipe.mask.threshold
        try:
            return merge(
                task.folder, kinds, len(near), recipe.evaluate, heldout, threshold, task.describe()
            )
        finally:
            _clear(task.folder)

    if failed := on_rank0(merge_shares):
        raise RuntimeError("; ".join(failed))


def _measure(task: Evaluation, recipe: Recipe, kinds: list[str], share: int, shares: int) -> Files:
    """Run the evaluation of one share; its results, or for each kind the reason why there is none.

    Raises:
        TrainingStopped: another rank is gone meanwhile.
        Interrupted: the run is to end, which every rank notices here or when they meet.
    """
    command = [sys.executable, str(SCRIPT), *_arguments(task, recipe, kinds, share, shares)]
    if torch.cuda.is_available():
        command += ["--device", f"cuda:{torch.cuda.current_device()}"]
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    process = subprocess.Popen(command, env=environment)  # what it could not do, it writes down
    heart = heartbeat.mine()
    try:
        while True:
            try:
                code = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                signals.check()
                if heart:
                    heart.check()
    finally:
        process.kill()  # where it has not ended
    for kind in kinds:
        if not part(task.folder, kind, share).is_file():
            reason = failure(task.folder, kind, share)
            if not reason.is_file():
                reason.write_text(f"{kind}: {_end(code)}", encoding="utf-8")
    found = sorted(task.folder.glob(f"share-{share}.*"))
    content = {path.name: path.read_bytes() for path in found}
    for path in found:
        path.unlink()
    return content


def _end(code: int) -> str:
    """How the process of this rank ended without a word."""
    if code >= 0:
        return f"the evaluation process of rank {rank()} ended with exit code {code}"
    text = f"the evaluation process of rank {rank()} was ended by {signal.Signals(-code).name}"
    return text + ": was there enough memory?" * (code == -signal.SIGKILL)


def _arguments(
    task: Evaluation, recipe: Recipe, kinds: list[str], share: int, shares: int
) -> list[str]:
    arguments = {
        "--checkpoint": task.checkpoint,
        "--revision": task.revision,
        "--tokenizer": recipe.model.tokenizer if task.stage == 0 else None,
        "--recipe": str(task.run / "recipe.yaml"),
        "--heldout": str(task.run / "heldout"),
        "--output": str(task.folder),
        "--share": f"{share}/{shares}",
        "--attention": recipe.model.attention,
    }
    given = [x for name, value in arguments.items() if value for x in (name, value)]
    if "end_tasks" in kinds:
        given += ["--end-tasks", *recipe.end_tasks_after(task.stage)]
    return [*given, "--tasks", *kinds]


def _prepare(folder: Path) -> None:
    """An empty place for the shares: those of a broken attempt may be of another number."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)


def _clear(folder: Path) -> None:
    for leftover in folder.glob("share-*"):
        leftover.unlink()
