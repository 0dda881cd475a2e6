"""End tasks: what a checkpoint knows of its domains, by fine-tuning copies of it.

The second stage of the DAS benchmark (Ke et al. 2023; the paper, section 4.2). For each task and
seed a copy of the checkpoint is trained on the task's training rows and tested on its test rows,
in a process of its own. Whatever was measured of a checkpoint lies in `end_tasks/`, so that a
measurement that was broken off continues.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval.measure.classification import METRICS
from eval.measure.classifier import HEADS, Encoded, Source
from eval.measure.end_task_data import Row, Task, load_task
from eval.measure.results import replace_file, write_arrays, write_json
from eval.measure.side_by_side import run_side_by_side
from pipeline.checkpoint import is_published, read_manifest
from pipeline.errors import UserError
from pipeline.recipe import EndTasks

# What does not change a result.
FREE = ("processes", "after", "tasks", "files", "seeds")
TESTED = 64  # rows of a test batch
SIDE_BY_SIDE_ON_GPU = 4


def check(settings: EndTasks) -> None:
    """Whether the rows of every task can be used.

    Raises:
        UserError: one message with what is wrong with each task.
    """
    found = []
    for key in settings.tasks:
        try:
            task = load_task(key, settings, tell=True)
            if settings.patience and "dev" not in task.splits:
                raise UserError(
                    f"evaluate.end_tasks.patience: {task.source} has no dev split to stop by; add "
                    "one, or remove it"
                )
        except UserError as error:
            found.append(str(error))
    if found:
        raise UserError("\n".join(found))


def evaluate_share(
    source: Source, settings: EndTasks, keys: list[str], output: Path, share: tuple[int, int]
) -> None:
    """Fine-tune on every share[1]-th pair of a task and a seed, from share[0] on, and write
    `output` (.json): what was measured. What lies in `end_tasks/` beside it is not done again.

    Raises:
        UserError: bad rows; what could not be measured, with the reasons (the rest is kept).
    """
    kept = output.parent / "end_tasks"
    kept.mkdir(exist_ok=True)
    tasks = {key: load_task(key, settings) for key in keys}
    pairs = [(key, seed) for key in keys for seed in settings.seeds]
    longest_first = sorted(pairs, key=lambda pair: -_cost(tasks[pair[0]]))
    mine = longest_first[share[0] :: share[1]]
    jobs = []
    for key, seed in mine:
        path = kept / f"{key}-{seed}.json"
        identity = _identity(source, tasks[key], settings)
        if _known(path, identity) is None:
            jobs.append((source, tasks[key], settings, seed, path, identity))
    bar = tqdm(total=len(mine), desc="end tasks", leave=False, disable=share[0] != 0 or None)
    bar.update(len(mine) - len(jobs))
    processes = settings.processes or _processes(source.device, share[1])
    failed = run_side_by_side(_measure, jobs, processes, lambda _: bar.update())
    bar.close()
    if failed:
        reasons = [f"{jobs[i][1].name}, seed {jobs[i][3]}: {why}" for i, why in failed.items()]
        raise UserError("; ".join(reasons))
    results = {f"{k}-{s}": json.loads((kept / f"{k}-{s}.json").read_bytes()) for k, s in mine}
    about = {key: _describe(task, settings, key) for key, task in tasks.items()}
    output.write_text(json.dumps({"tasks": about, "results": results}) + "\n", encoding="utf-8")


def fine_tune(source: Source, task: Task, settings: EndTasks, seed: int) -> dict[str, Any]:
    """Train a copy of the checkpoint on a task and test it.

    AdamW, its rate falling linearly to zero without warm-up, no clipping; the last epoch is tested,
    or with `patience` the best one on dev. `seed` draws the head, the order and the dropout.

    Returns {accuracy, macro_f1, micro_f1, losses: of each step, epochs, tested_epoch, predictions}.
    """
    head = HEADS[settings.score](source, task, settings, seed)
    rows = {split: [head.encode(row) for row in found] for split, found in task.splits.items()}
    train, net = rows["train"], head.net
    optimizer = torch.optim.AdamW(net.parameters(), lr=task.lr, weight_decay=settings.weight_decay)
    steps = task.epochs * math.ceil(len(train) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the dropout
    losses: list[float] = []
    best: tuple[float, int, Any] = (-1.0, 0, None)
    for epoch in range(1, task.epochs + 1):
        net.train()
        for batch in torch.randperm(len(train), generator=order).split(settings.batch_size):
            loss = head.loss([train[i] for i in batch.tolist()])
            if not torch.isfinite(loss):
                raise UserError(
                    f"{task.name}, seed {seed}: the loss is no number any more; lower "
                    "evaluate.end_tasks.lr"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if settings.patience:
            score = METRICS[task.metric](_truth(rows["dev"]), _predict(head, rows["dev"]))
            if score > best[0]:
                best = (score, epoch, deepcopy(net.state_dict()))
            elif epoch - best[1] >= settings.patience:
                break
    if best[2] is not None:
        net.load_state_dict(best[2])
    predicted = _predict(head, rows["test"])
    scores = {name: f(_truth(rows["test"]), predicted) for name, f in METRICS.items()}
    return {
        **scores,
        "losses": losses,
        "epochs": epoch,
        "tested_epoch": best[1] or epoch,
        "predictions": predicted,
    }


def merge_shares(parts: list[Path], output: Path, info: dict[str, Any]) -> None:
    """Put the shares together and write `output` (end_tasks.json) atomically: {**info, tasks:
    {name: task, domain, metric, labels, rows, epochs, lr, source, seeds: {seed: score, accuracy,
    macro_f1, micro_f1, loss, epochs, tested_epoch, seconds}, score, accuracy, score_stderr,
    accuracy_stderr}}.

    `score` is the task's metric; the means are over the seeds, and so are their standard errors
    (null for one seed). `loss` is the mean of the last epoch's. Beside it `end_tasks.npz`:
    `<name>/<seed>` int16 [test rows], the predictions; `truth/<name>`. The parts are deleted.
    """
    shares = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
    results = {k: v for share in shares for k, v in share["results"].items()}
    tasks, arrays = {}, {}
    for name, about in shares[0]["tasks"].items():
        arrays[f"truth/{name}"] = np.array(about.pop("truth"), np.int16)
        seeds = {}
        for seed in about.pop("seeds"):
            result = results[f"{name}-{seed}"]
            arrays[f"{name}/{seed}"] = np.array(result.pop("predictions"), np.int16)
            del result["identity"]
            seeds[str(seed)] = {"score": result[about["metric"]], **result}
        means: dict[str, float | None] = {}
        for key in ("score", "accuracy"):
            values = [seed[key] for seed in seeds.values()]
            means[key] = float(np.mean(values))
            many = len(values) > 1
            stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if many else None
            means[f"{key}_stderr"] = stderr
        tasks[name] = {**about, "seeds": seeds, **means}
    write_arrays(output.with_name("end_tasks.npz"), arrays)
    write_json(output, {**info, "tasks": tasks})
    for part in parts:
        part.unlink()


def _measure(
    source: Source, task: Task, settings: EndTasks, seed: int, path: Path, identity: str
) -> None:
    """Fine-tune in this process and keep the result in `path`."""
    start = time.perf_counter()
    result = fine_tune(source, task, settings, seed)
    losses = result.pop("losses")
    last = losses[-math.ceil(len(task.splits["train"]) / settings.batch_size) :]
    result |= {"loss": sum(last) / len(last), "seconds": time.perf_counter() - start}
    replace_file(path, (json.dumps({"identity": identity, **result}) + "\n").encode())


def _known(path: Path, identity: str) -> dict[str, Any] | None:
    """What an earlier measurement of the same kept."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return known if known.get("identity") == identity else None


def _identity(source: Source, task: Task, settings: EndTasks) -> str:
    """Of everything that a result depends on, but for the seed."""
    folder = Path(source.path)
    weights: Any = [source.path, source.revision]
    if is_published(folder):
        weights = read_manifest(folder)["files"]
    elif folder.exists():
        files = [folder] if folder.is_file() else sorted(f for f in folder.iterdir() if f.is_file())
        weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    about = {k: v for k, v in asdict(settings).items() if k not in FREE}
    row = (task.digest, task.metric, task.epochs, task.lr)
    changed = [source.overrides] if source.overrides else []
    content = json.dumps([weights, source.tokenizer, row, about, *changed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _describe(task: Task, settings: EndTasks, key: str) -> dict[str, Any]:
    return {
        "task": task.name,
        "domain": settings.tasks[key].domain or key,
        "metric": task.metric,
        "labels": task.labels,
        "rows": {split: len(rows) for split, rows in task.splits.items()},
        "epochs": task.epochs,
        "lr": task.lr,
        "head": settings.score,
        "source": task.source,
        "seeds": settings.seeds,
        "truth": [row.label for row in task.splits["test"]],
    }


def _cost(task: Task) -> int:
    return task.epochs * len(task.splits["train"])


def _processes(device: str, shares: int) -> int:
    cores = max(1, len(os.sched_getaffinity(0)) // shares)
    return cores if device == "cpu" else min(cores, SIDE_BY_SIDE_ON_GPU)


def _truth(rows: Sequence[Row | Encoded]) -> list[int]:
    return [row.label for row in rows]


@torch.inference_mode()
def _predict(head: Any, rows: Sequence[Encoded]) -> list[int]:
    """Of each row, in their order; rows of similar length share a batch."""
    net: nn.Module = head.net
    net.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = [0] * len(rows)
    for i in range(0, len(order), TESTED):
        places = order[i : i + TESTED]
        answers = head.predict([rows[place] for place in places])
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    return found
