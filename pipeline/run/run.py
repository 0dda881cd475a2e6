"""A run: stage 0, then for each stage train, publish, evaluate, report. Rerun to continue.

Every stage starts from the checkpoint that the stage before published, so a run that was
interrupted and continued is the same run (docs/runs.md).
"""

import gc
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from pipeline.checkpoint import MANIFEST, is_published, publish, require_space, verify
from pipeline.data.batches import (
    StagePlan,
    plan_stage,
    prefetch,
    stage_documents,
    training_batches,
)  # fmt: skip
from pipeline.data.heldout import prepare_heldout
from pipeline.data.reader import BadLines
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.engine.config import check_quantized, precision_of
from pipeline.engine.fsdp import FsdpEngine
from pipeline.engine.zero import ZeroEngine
from pipeline.errors import UserError
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.gguf import local_weights
from pipeline.model.load import build_model, check_model, check_pretrained, load_config
from pipeline.model.lora import is_adapter
from pipeline.progress import EventLog, now, say
from pipeline.ranks import on_rank0, rank, world_size
from pipeline.recipe import Model, Recipe
from pipeline.run.folder import describe_model, open_run, stage_folder, step_folder
from pipeline.run.train import train_stage

TOKENIZER_DOCUMENTS = 100_000


RESULTS = {"heldout": "eval.json", "benchmarks": "benchmarks.json", "humaneval": "humaneval.json"}


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate (a published folder or a hub id), and where the results go."""

    run: Path
    stage: int
    name: str
    checkpoint: str
    revision: str | None = None
    step: int | None = None  # within the stage; None at its end
    progress: float | None = None  # at that step, in the stage's unit

    @property
    def folder(self) -> Path:
        folder = stage_folder(self.run, self.stage, self.name)
        return folder if self.step is None else step_folder(folder, self.step)

    def pending(self, recipe: Recipe) -> list[str]:
        """What of RESULTS the recipe wants and is not there yet."""
        wanted = {
            "heldout": True,
            "benchmarks": bool(recipe.evaluate.benchmarks),
            "humaneval": recipe.evaluate.humaneval is not None,
        }
        return [k for k, yes in wanted.items() if yes and not (self.folder / RESULTS[k]).is_file()]


@dataclass
class Run:
    """What the stages share."""

    folder: Path
    recipe: Recipe
    engine_config: dict[str, Any]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    log: EventLog | None  # on rank 0

    def checkpoint(self, stage: int) -> Path:
        name = self.recipe.stages[stage - 1].name if stage else "base"
        return stage_folder(self.folder, stage, name) / "checkpoint"


def run_recipe(
    recipe: Recipe,
    engine_config: dict[str, Any],
    runs: Path,
    evaluate: Callable[[Evaluation, Recipe, list[str]], None],
    report: Callable[[Path], Path],
) -> Path:
    """Do what is not done yet of a recipe; returns the report's page. All ranks call it.

    evaluate: called by all ranks; raises RuntimeError on all of them where an evaluation failed.
        Training goes on then, and the next run tries it again.
    report: called by rank 0 with the run folder.

    Raises:
        UserError: the folder is in use or another recipe's; bad data; a full disk; at the end, if
            an evaluation failed.
        TrainingStopped: a loss, magnitude or gradient is not finite.
    """
    folder = runs / recipe.name
    with open_run(folder, recipe, engine_config):
        run = _prepare(folder, recipe, engine_config)
        failed: list[str] = []

        def measure(task: Evaluation) -> float:
            start = time.perf_counter()
            pending = on_rank0(partial(task.pending, recipe))
            if pending:
                _tell(f"{_place(task)}: measuring {', '.join(pending)}")
                try:
                    evaluate(task, recipe, pending)
                except RuntimeError as error:
                    failed.append(f"{task.folder}: {error}")
                    _tell(f"{_place(task)}: evaluation failed ({error}); training goes on")
                on_rank0(partial(report, folder))
            return time.perf_counter() - start

        measure(Evaluation(folder, 0, "base", _base_checkpoint(run), recipe.model.revision))
        for stage, s in enumerate(recipe.stages, start=1):
            published = run.checkpoint(stage)
            result = None
            if on_rank0(partial(is_published, published)):
                _tell(f"stage {stage} {s.name}: finished before")
                on_rank0(partial(verify, published))
                for task in on_rank0(partial(_within, run, stage)):  # what failed there before
                    measure(task)
            else:
                result = _train(run, stage, measure)
            eval_seconds = measure(Evaluation(folder, stage, s.name, str(published)))
            if result is not None and run.log is not None:
                run.log.write(
                    "stage", stage=stage, domain=s.name, **result, eval_seconds=eval_seconds
                )
        page = on_rank0(partial(report, folder))
    if failed:
        raise UserError(
            "some evaluations failed; run the same command again to retry them alone:\n  "
            + "\n  ".join(failed)
        )
    return page


def _prepare(folder: Path, recipe: Recipe, engine_config: dict[str, Any]) -> Run:
    tokenizer = _tokenizer(folder, recipe)
    config = load_config(recipe.model, len(tokenizer))
    check_model(config, recipe, len(tokenizer))
    check_quantized(recipe.model.lora, engine_config)
    on_rank0(partial(describe_model, folder, recipe, config))
    on_rank0(partial(check_pretrained, recipe.model, config))
    if not on_rank0(partial(is_published, folder / "heldout")):
        on_rank0(partial(prepare_heldout, recipe, tokenizer, folder / "heldout"))
    log = EventLog(folder / "log.jsonl") if rank() == 0 else None
    return Run(folder, recipe, engine_config, config, tokenizer, log)


def _train(run: Run, stage: int, measure: Callable[[Evaluation], float]) -> dict[str, Any]:
    """Train a stage from the checkpoint before it and publish it; its numbers for the log."""
    recipe = run.recipe
    s = recipe.stages[stage - 1]
    plan: StagePlan = on_rank0(partial(plan_stage, recipe, stage, run.tokenizer))
    _tell_examples(plan, recipe, s.name)
    on_rank0(partial(_clear_within, run, stage))
    torch.manual_seed(recipe.stage_seed(stage) * 100_003 + rank())
    source = None if stage == 1 and _starts_elsewhere(recipe.model) else run.checkpoint(stage - 1)
    # In half precision the engine converts weights itself, as it shards them.
    keep_dtype = precision_of(run.engine_config) != "fp32"
    model = build_model(recipe.model, run.config, source, recipe.seed, keep_dtype)
    dtype = getattr(torch, recipe.train.publish_dtype)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) * dtype.itemsize
    on_rank0(partial(require_space, run.folder, size))
    engine = _engine(model, run.engine_config, recipe)
    mask = None
    if recipe.mask.enabled and stage >= recipe.mask.from_stage:
        mask = GradientMask(engine.module, recipe.mask, recipe.stage_seed(stage))
    bad: dict[str, BadLines] = {}
    batches = prefetch(
        training_batches(recipe, stage, run.tokenizer, rank(), world_size(), bad),
        recipe.data.prefetch,
    )
    pause = partial(_evaluate_within, run, stage, engine, dtype, measure)
    pauses = plan.pauses(s.evaluate_every)
    result = train_stage(engine, mask, batches, recipe, stage, plan.steps, run.log, pauses, pause)
    batches.close()
    _report_bad_lines(bad, run.log)
    start = time.perf_counter()
    info = {"stage": stage, "name": s.name, "steps": result.steps, "tokens": result.tokens}
    _publish(run, run.checkpoint(stage), engine, dtype, info)
    publish_seconds = time.perf_counter() - start
    if mask:
        mask.close()
    engine.close()
    del engine, model, mask, pause
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {
        "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds,
        "publish_seconds": publish_seconds,
        "data": asdict(plan.examples) if plan.examples else None,
    }  # fmt: skip


def _evaluate_within(
    run: Run,
    stage: int,
    engine: ZeroEngine | FsdpEngine,
    dtype: torch.dtype,
    measure: Callable[[Evaluation], float],
    step: int,
    progress: float,
) -> None:
    """Publish and measure the model as it is after a step of a stage."""
    name = run.recipe.stages[stage - 1].name
    target = step_folder(stage_folder(run.folder, stage, name), step) / "checkpoint"
    info = {"stage": stage, "name": name, "steps": step, "progress": progress}
    _publish(run, target, engine, dtype, info)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # room for the evaluation's own copy of the model
    measure(Evaluation(run.folder, stage, name, str(target), None, step, progress))


def _engine(
    model: nn.Module, engine_config: dict[str, Any], recipe: Recipe
) -> ZeroEngine | FsdpEngine:
    kind = FsdpEngine if recipe.engine.kind == "fsdp" else ZeroEngine
    return kind(model, engine_config, recipe.optimizer)


def _publish(
    run: Run,
    target: Path,
    engine: ZeroEngine | FsdpEngine,
    dtype: torch.dtype,
    info: dict[str, Any],
) -> None:
    """Gather the weights on rank 0 and write them in Hugging Face format."""
    module: Any = engine.module
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    unpublished = frozen if run.recipe.model.lora else set()  # an adapter goes without its base
    weights = {}
    for name, weight in engine.full_weights():
        if rank() == 0 and name not in unpublished:
            weights[name] = weight.to(dtype)
    if rank() == 0:
        persistent = module.state_dict().keys()
        buffers = {n: b.detach().cpu() for n, b in module.named_buffers() if n in persistent}
        weights.update(buffers)

    def write(folder: Path) -> None:
        module.save_pretrained(folder, state_dict=weights)
        if not is_adapter(folder):  # transformers names the dtype of the module, not of the file
            module.config.dtype = dtype
            module.config.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    on_rank0(partial(publish, target, write, {**info, "published": now()}))


def _base_checkpoint(run: Run) -> str:
    """What stage 0 evaluates: the pretrained model where it is, or what the run published of a
    model with random weights."""
    model = run.recipe.model
    if _starts_elsewhere(model):
        return str(model.path)
    target = run.checkpoint(0)

    def write(folder: Path) -> None:
        built: Any = build_model(model, run.config, None, run.recipe.seed)
        built.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    if not on_rank0(partial(is_published, target)):
        on_rank0(partial(publish, target, write, {"stage": 0, "name": "base"}))
    return str(target)


def _starts_elsewhere(model: Model) -> bool:
    """Whether all weights before stage 1 are those of `model.path`."""
    return model.path is not None and not model.initialize_missing


def _tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; trained on the first stage's text where it says so."""
    vocabulary = recipe.model.train_tokenizer
    if vocabulary is None:
        name = recipe.model.tokenizer or recipe.model.path
        assert name is not None  # a recipe without both is refused
        return load_tokenizer(local_weights(name), recipe.model.revision)
    target = folder / "tokenizer"

    def train() -> None:
        documents = stage_documents(recipe, recipe.stages[0].domains)(0)
        every = (d if isinstance(d, str) else f"{d.prompt}\n{d.response}" for d in documents)
        texts = islice(every, TOKENIZER_DOCUMENTS)
        first = next(texts, None)
        if first is None:
            raise UserError(f"data.domains.{recipe.stages[0].name}: no document to train on")
        trained = train_tokenizer(chain([first], texts), vocabulary)

        def write(folder: Path) -> None:
            trained.save_pretrained(folder)

        publish(target, write, {"vocabulary": len(trained)})

    if not on_rank0(partial(is_published, target)):
        on_rank0(train)
    return load_tokenizer(str(target))


def _report_bad_lines(bad: dict[str, BadLines], log: EventLog | None) -> None:
    for name, lines in bad.items():
        if lines.count and log is not None:
            examples = [{"file": f, "line": n, "reason": r} for f, n, r in lines.examples]
            log.write("bad_lines", domain=name, count=lines.count, examples=examples)
            _tell(f"  {name}: skipped {lines.count} broken rows, for example\n{lines.listing()}")


def _within(run: Run, stage: int) -> list[Evaluation]:
    """The evaluations within a finished stage, from the checkpoints that lie there."""
    name = run.recipe.stages[stage - 1].name
    tasks = []
    for folder in sorted(stage_folder(run.folder, stage, name).glob("step-*/checkpoint")):
        info = json.loads((folder / MANIFEST).read_text())
        tasks.append(
            Evaluation(run.folder, stage, name, str(folder), None, info["steps"], info["progress"])
        )
    return tasks


def _clear_within(run: Run, stage: int) -> None:
    """Delete what a broken attempt of this stage published."""
    folder = stage_folder(run.folder, stage, run.recipe.stages[stage - 1].name)
    for leftover in folder.glob("step-*"):
        shutil.rmtree(leftover)


def _place(task: Evaluation) -> str:
    return f"stage {task.stage} {task.name}" + (f", step {task.step}" if task.step else "")


def _tell_examples(plan: StagePlan, recipe: Recipe, name: str) -> None:
    if plan.examples:
        _tell(f"{name}: {plan.examples.describe(recipe.data.sequence_length)}")


def _tell(text: str) -> None:
    if rank() == 0:
        say(text)
