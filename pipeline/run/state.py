"""What the stages of a run share: the folder, the data, the engine and what it holds."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from pipeline.checkpoint import is_published, publish
from pipeline.methods.method import Method, Start
from pipeline.model.attention import Separation
from pipeline.model.load import build_model
from pipeline.progress import EventLog, say
from pipeline.ranks import on_rank0, rank
from pipeline.recipe import Recipe
from pipeline.run.build import Engine, build_engine, starts_elsewhere
from pipeline.run.data import RunData
from pipeline.run.evaluation import Evaluation
from pipeline.run.folder import MASTERS, stage_folder
from pipeline.run.published import publish_model
from pipeline.run.stage_rows import split_for_stage, split_stage

# (engine, separation, held-out folder, domains, batch size) -> nats per predicted token by domain.
HeldoutLosses = Callable[[Any, Separation | None, Path, list[str], int], dict[str, float]]


@dataclass
class Run:
    """What the stages share."""

    folder: Path
    recipe: Recipe
    engine_config: dict[str, Any]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    data: RunData
    log: EventLog | None  # on rank 0
    engine: Engine | None = None  # made when it is first needed: `engine_with`
    methods: list[Method] = field(default_factory=list)
    heldout_losses: HeldoutLosses | None = None
    begun: Start | None = None  # what the methods know of the run
    check_folder: Callable[[], None] = lambda: None  # raises where another process has taken it
    separation: Separation | None = None  # found before the engine shards the model
    holds: str | None = None  # the checkpoint whose weights it has; None: of no checkpoint
    rows: int | None = None  # the stage by whose rows it is split: `split_stage`

    def checkpoint(self, stage: int) -> Path:
        name = self.recipe.stages[stage - 1].name if stage else "base"
        return stage_folder(self.folder, stage, name) / "checkpoint"

    def masters(self, stage: int) -> Path:
        """Beside the newest checkpoint, where that has a lower precision than fp32."""
        return self.checkpoint(stage).with_name(MASTERS)

    @property
    def keeps_masters(self) -> bool:
        return self.recipe.train.publish_dtype != "float32" and not self.adds_adapters

    @property
    def adds_adapters(self) -> bool:
        """Whether every stage trains an adapter or prompt of its own, beside what is published."""
        lora, prompt = self.recipe.model.lora, self.recipe.model.prompt
        return bool((lora and lora.incremental) or (prompt and prompt.progressive))


def engine_with(run: Run, checkpoint: str, stage: int, train: bool = True) -> Engine:
    """The run's engine with the weights of a checkpoint: a stage's, or what stage 1 starts from.

    It is made once in a run. What an interrupted run has left to measure at an older checkpoint
    makes another one, and so does each stage where the rows that it trains are chosen before it.

    stage: that it trains, or by whose rows it is split where it measures (`train` False).
    """
    rows = split_stage(run.recipe, stage)
    if run.engine is not None and run.holds == checkpoint and (not train or run.rows == rows):
        return run.engine
    close_engine(run)
    recipe = run.recipe if train or not run.adds_adapters else _without_new_ones(run.recipe)
    run.engine, run.separation = build_engine(
        recipe, run.engine_config, run.config, checkpoint,
        None if rows is None else partial(
            split_for_stage, stage=rows, recipe=run.recipe, engine_config=run.engine_config,
            folder=run.checkpoint(rows).parent, batches=partial(run.data.batches, rows),
        ),
    )  # fmt: skip
    run.holds, run.rows = checkpoint, rows
    return run.engine


def _without_new_ones(recipe: Recipe) -> Recipe:
    """To measure what a stage has published, without the adapter or prompt that the next one adds:
    a prompt speaks before it is trained, and composed adapters share among all."""
    lora, prompt = recipe.model.lora, recipe.model.prompt
    model = replace(
        recipe.model,
        lora=lora and replace(lora, incremental=False),
        prompt=prompt and replace(prompt, progressive=False),
    )
    return replace(recipe, model=model)


def close_engine(run: Run) -> None:
    if run.engine is not None:
        run.engine.close()
        run.engine = run.holds = None
        free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def publish_weights(run: Run, target: Path, engine: Engine, info: dict[str, Any]) -> None:
    dtype = getattr(torch, run.recipe.train.publish_dtype)
    publish_model(target, engine, run.tokenizer, dtype, info, run.methods)
    run.holds = str(target)


def base_checkpoint(run: Run) -> str:
    """What stage 0 evaluates: the pretrained model where it is, or what the run published of a
    model with random weights."""
    model = run.recipe.model
    if starts_elsewhere(model):
        return str(model.path)
    target = run.checkpoint(0)

    def write(folder: Path) -> None:
        built: Any = build_model(model, run.config, None, run.recipe.seed)
        built.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    if not on_rank0(partial(is_published, target)):
        on_rank0(partial(publish, target, write, {"stage": 0, "name": "base"}))
    return str(target)


def place_of(task: Evaluation) -> str:
    return f"stage {task.stage} {task.name}" + (f", step {task.step}" if task.step else "")


def tell(text: str) -> None:
    if rank() == 0:
        say(text)
