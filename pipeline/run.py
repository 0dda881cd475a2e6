"""A run: stage 0, then for each stage train, publish, evaluate, report. Rerun to continue.

On disk (docs/runs.md): every stage starts from the checkpoint that the stage before published, so a
run that was interrupted and continued is the same run.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import is_published, publish, require_space, verify
from pipeline.data.batches import stage_documents, stage_steps, training_batches
from pipeline.data.heldout import prepare_heldout
from pipeline.data.reader import BadLines
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.engine.zero import ZeroEngine
from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.load import build_model, check_model, load_config
from pipeline.progress import EventLog, now, say
from pipeline.ranks import on_rank0, rank, world_size
from pipeline.recipe import Recipe
from pipeline.run_folder import open_run, stage_folder
from pipeline.train import train_stage

TOKENIZER_DOCUMENTS = 100_000


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation of a stage is asked: a checkpoint, and where its result goes."""

    run: Path
    stage: int
    name: str
    checkpoint: str
    revision: str | None = None

    @property
    def result(self) -> Path:
        return stage_folder(self.run, self.stage, self.name) / "eval.json"


def run(
    recipe: Recipe,
    ds_config: dict[str, Any],
    runs: Path,
    evaluate: Callable[[Evaluation, Recipe], None],
    report: Callable[[Path], Path],
) -> Path:
    """Do what is not done yet of a recipe; returns the report's page.

    Called on every rank. `evaluate` runs on every rank and raises RuntimeError where an evaluation
    failed: training goes on, and the next run tries it again. `report` runs on rank 0.

    Raises:
        UserError: the folder is in use or holds another recipe's run; bad data; a full disk; an
            evaluation failed (at the end).
    """
    folder = runs / recipe.name
    with open_run(folder, recipe, ds_config):
        return _stages(folder, recipe, ds_config, evaluate, report)


def _stages(folder, recipe, ds_config, evaluate, report) -> Path:
    tokenizer = _tokenizer(folder, recipe)
    config = load_config(recipe.model, len(tokenizer))
    check_model(config, recipe, len(tokenizer))
    heldout = folder / "heldout"
    if not is_published(heldout):
        on_rank0(lambda: prepare_heldout(recipe, tokenizer, heldout))
    log = EventLog(folder / "log.jsonl") if rank() == 0 else None
    failed: list[str] = []

    def measure(stage: int, name: str, checkpoint: str, revision: str | None = None) -> float:
        task = Evaluation(folder, stage, name, checkpoint, revision)
        start = time.perf_counter()
        if not on_rank0(task.result.is_file):
            try:
                evaluate(task, recipe)
            except RuntimeError as error:
                failed.append(f"{task.result}: {error}")
                tell(f"evaluation failed, training goes on: {error}")
            on_rank0(lambda: report(folder))
        return time.perf_counter() - start

    previous = _base_checkpoint(folder, recipe, config, tokenizer)
    measure(0, "base", previous, recipe.model.revision)
    for stage, s in enumerate(recipe.stages, start=1):
        published = stage_folder(folder, stage, s.name) / "checkpoint"
        if on_rank0(lambda path=published: is_published(path)):
            tell(f"stage {stage} {s.name}: finished before")
            on_rank0(lambda path=published: verify(path))
            measure(stage, s.name, str(published))
        else:
            source = previous if stage > 1 or recipe.model.path is None else None
            result, publish_seconds = _train_and_publish(
                recipe, ds_config, config, tokenizer, stage, source, published, log
            )
            seconds = measure(stage, s.name, str(published))
            if log is not None:
                log.write(
                    "stage", stage=stage, domain=s.name, steps=result.steps, tokens=result.tokens,
                    seconds=round(result.seconds, 3), publish_seconds=round(publish_seconds, 3),
                    eval_seconds=round(seconds, 3),
                )
        previous = str(published)
    page = on_rank0(lambda: report(folder))
    if failed:
        raise UserError(
            "some evaluations failed; run the same command again to retry them alone:\n  "
            + "\n  ".join(failed)
        )
    return page


def _train_and_publish(
    recipe: Recipe, ds_config, config, tokenizer, stage: int, source: str | None, target: Path, log
):
    """Train one stage from `source` (None: the recipe's model) and publish it to `target`."""
    s = recipe.stages[stage - 1]
    steps = stage_steps(recipe, stage, tokenizer)
    torch.manual_seed((recipe.seed * 1009 + stage) * 100_003 + rank())
    model = build_model(recipe.model, config, source, recipe.seed)
    size = sum(p.numel() for p in model.parameters()) * (
        4 if recipe.train.publish_dtype == "float32" else 2
    )
    on_rank0(lambda: require_space(target.parents[2], size))
    engine = ZeroEngine(model, ds_config, recipe.optimizer)
    masked = recipe.mask.enabled and stage >= recipe.mask.from_stage
    mask = GradientMask(engine.module, recipe.mask, recipe.seed * 1009 + stage) if masked else None
    workers = recipe.data.workers
    if workers is None:
        workers = 1 if engine.device.type == "cuda" else 0
    bad: dict[str, BadLines] = {}
    batches = training_batches(recipe, stage, tokenizer, rank(), world_size(), workers, bad)
    result = train_stage(engine, mask, batches, recipe, stage, steps, log)
    _report_bad_lines(bad, log)
    if mask:
        mask.close()
    start = time.perf_counter()
    dtype = getattr(torch, recipe.train.publish_dtype)
    weights = {}
    for name, weight in engine.full_weights():
        if rank() == 0:
            weights[name] = weight.to(dtype)
    module = engine.module

    def write(folder: Path) -> None:
        module.save_pretrained(folder, state_dict={**_buffers(module), **weights})
        tokenizer.save_pretrained(folder)

    info = {"stage": stage, "name": s.name, "steps": steps, "tokens": result.tokens, "at": now()}
    on_rank0(lambda: publish(target, write, info))
    publish_seconds = time.perf_counter() - start
    engine.close()
    del engine, model, module, mask
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result, publish_seconds


def tell(text: str) -> None:
    if rank() == 0:
        say(text)


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    persistent = set(module.state_dict().keys())
    return {n: b.detach().cpu() for n, b in module.named_buffers() if n in persistent}


def _base_checkpoint(folder: Path, recipe: Recipe, config, tokenizer) -> str:
    """What stage 0 evaluates: the pretrained model where it is, or the published random one."""
    if recipe.model.path is not None:
        return recipe.model.path
    target = stage_folder(folder, 0, "base") / "checkpoint"

    def write(path: Path) -> None:
        build_model(recipe.model, config, None, recipe.seed).save_pretrained(path)
        tokenizer.save_pretrained(path)

    if not on_rank0(lambda: is_published(target)):
        on_rank0(lambda: publish(target, write, {"stage": 0, "name": "base"}))
    return str(target)


def _tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    if recipe.model.train_tokenizer is None:
        return load_tokenizer(recipe.model.tokenizer or recipe.model.path, recipe.model.revision)
    target = folder / "tokenizer"

    def train() -> None:
        # The first stage's corpora; an interleaved prefix is enough for a vocabulary.
        documents = stage_documents(recipe, recipe.stages[0].domains)(0)
        texts = islice(documents, TOKENIZER_DOCUMENTS)
        first = next(texts, None)
        if first is None:
            raise UserError(f"data.domains.{recipe.stages[0].name}: no document to train on")
        trained = train_tokenizer(chain([first], texts), recipe.model.train_tokenizer)
        publish(target, lambda path: trained.save_pretrained(path), {"kind": "tokenizer"})

    if not on_rank0(lambda: is_published(target)):
        on_rank0(train)
    return load_tokenizer(str(target))


def _report_bad_lines(bad: dict[str, BadLines], log: EventLog | None) -> None:
    for name, lines in bad.items():
        if lines.count and log is not None:
            examples = [{"file": f, "line": n, "reason": r} for f, n, r in lines.examples]
            log.write("bad_lines", domain=name, count=lines.count, examples=examples)
            shown = "\n".join(f"    {e['file']}:{e['line']}: {e['reason']}" for e in examples[:5])
            tell(f"  {name}: skipped {lines.count} bad rows, for example\n{shown}")
