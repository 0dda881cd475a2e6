"""`--measure`: how long a recipe's steps take here, and so how long its run would."""

import time
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from pipeline.data.mlm import IGNORED, collate
from pipeline.errors import UserError
from pipeline.model.compiled import compiled_blocks
from pipeline.model.load import empty_model, load_config
from pipeline.ranks import world_size
from pipeline.recipe import Recipe, Stage
from pipeline.run.build import build_engine
from pipeline.run.dry_run import planned_steps, planned_tokenizer
from pipeline.run.memory import advice_on_memory, split_as_in_training
from pipeline.run.methods import methods_of
from pipeline.run.speed import Speed, peak_memory, predictions
from pipeline.run.stage_rows import mask_of_stage, split_stage
from pipeline.run.train import train_stage

WARM, MEASURED = 1, 2  # steps


def measure_steps(recipe: Recipe, engine_config: dict[str, Any]) -> list[str]:
    """Train some steps on random tokens, in the recipe's shapes and modes and without writing
    anything, and say what that means for the run. All ranks call it.

    What methods add, evaluations and checkpoints are not in it.

    Raises:
        UserError: a step does not fit the GPU.
    """
    try:
        return _measure(recipe, engine_config)
    except torch.OutOfMemoryError:
        m = recipe.model
        model = empty_model(m, load_config(m, planned_tokenizer(m)[1]))
        split_as_in_training(model, recipe)
        advice = "; ".join(advice_on_memory(model, recipe, engine_config, world_size()))
        raise UserError(f"--measure: a step does not fit the GPU: {advice}") from None


def _measure(recipe: Recipe, engine_config: dict[str, Any]) -> list[str]:
    m = recipe.model
    tokenizer, vocabulary = planned_tokenizer(m)
    stage = len(recipe.stages)
    split = None
    if split_stage(recipe, stage) is not None:
        split = lambda net, **_: split_as_in_training(net, recipe)  # noqa: E731
    config = load_config(m, vocabulary)
    engine, separation = build_engine(recipe, engine_config, config, None, split)
    engine.start_stage()
    mask = mask_of_stage(engine.module, recipe, stage)
    count = WARM + MEASURED
    short = deepcopy(recipe)
    short.stages = [*recipe.stages[:-1], Stage(recipe.stages[-1].domain, steps=count)]
    ends = [time.perf_counter()]

    def after_step(_: int) -> bool:
        ends.append(time.perf_counter())
        return False

    with compiled_blocks(engine.module) if recipe.train.compile else nullcontext():
        train_stage(
            engine, mask, iter([_step(recipe, vocabulary)] * count), short, stage, count, None,
            after_step, separation=separation,
        )  # fmt: skip
    seconds = (ends[-1] - ends[WARM]) / MEASURED
    tokens = recipe.train.batch_size * recipe.data.sequence_length
    speed = Speed(engine.module, recipe, engine.device)
    fast = speed.numbers(tokens, predictions(recipe, tokens), seconds)
    lines = [
        f"measured    {seconds:.2f} s a step ({MEASURED} steps of full rows of random tokens), "
        f"{fast['tokens_per_second']:,.0f} tokens/s, {fast['tflops']:.3g} TFLOPS a rank"
        + (f", MFU {fast['mfu']:.0%}" if "mfu" in fast else ""),
        f"  memory    {peak_memory(engine.device) / 1e9:.2f} GB at its peak, on rank 0",
    ]
    total, known = 0, True
    for i, s in enumerate(recipe.stages, start=1):
        steps = planned_steps(recipe, i, tokenizer)
        if steps is None:
            lines.append(f"  {i} {s.name}: {1000 * seconds / 60:.1f} minutes per 1,000 steps")
            known = False
            continue
        total += steps
        lines.append(f"  {i} {s.name}: {steps * seconds / 60:.1f} minutes of training")
    if known:
        others = " and ".join(["evaluations", *(f"what {m.name} adds" for m in methods_of(recipe))])
        lines.append(f"  in all {total * seconds / 60:.1f} minutes, and {others} on top")
    if mask:
        mask.close()
    engine.close()
    return lines


def _step(recipe: Recipe, vocabulary: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step of full rows; an encoder-decoder's have `data.masking` of
    their tokens as the target."""
    generator = np.random.default_rng(0)
    size = recipe.train.micro_batch_size or recipe.train.batch_size // world_size()
    length = recipe.data.sequence_length

    def row() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = generator.integers(5, vocabulary, length)
        labels = ids.copy()
        if recipe.model.objective == "masked":
            labels[generator.random(length) >= recipe.data.masking] = IGNORED
        elif recipe.model.objective == "seq2seq":
            labels[: length - max(1, round(length * recipe.data.masking))] = IGNORED
        return ids, labels, np.zeros(length, dtype=np.int64)

    count = recipe.train.batch_size // (world_size() * size)
    return [collate([row() for _ in range(size)]) for _ in range(count)]
