"""What methods add to the wall time of continual pretraining (the paper's Table 10): the training
loop itself, on random masked text, under fine-tuning, MIGU, DAS and distillation in turn.

    python benchmarks/method_time.py --hidden 768 --layers 2 --batch 8 --length 164

Prints the median step of each by the clock and in CPU seconds, which other processes disturb less,
and the ratios to those of fine-tuning.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from roberta import add_sizes, roberta

from pipeline.engine.config import resolve_ds_config
from pipeline.engine.distributed import start_distributed
from pipeline.engine.zero import ZeroEngine
from pipeline.method_settings import Das as DasSettings
from pipeline.method_settings import Distill as DistillSettings
from pipeline.methods.das import Das
from pipeline.methods.distill import Distill
from pipeline.methods.importance import gates_of
from pipeline.methods.method import Method, Start, Teacher
from pipeline.migu.gradient_mask import GradientMask
from pipeline.recipe import Recipe
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import train_stage

METHODS = ("ft", "migu", "kd", "das")


class Seconds:
    """A log that keeps how long the steps took: by the clock, and of this process's CPU."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._cpu = time.process_time()

    def write(self, _event: str, **values: Any) -> None:
        before, self._cpu = self._cpu, time.process_time()
        self.steps.append((values["seconds"], self._cpu - before))


def batches(args: argparse.Namespace) -> Iterator[list[dict[str, torch.Tensor]]]:
    """15 % of the tokens are predicted."""
    while True:
        ids = torch.randint(5, args.vocabulary, (args.batch, args.length))
        labels = ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)
        yield [{"input_ids": ids, "labels": labels}]


def measure(name: str, recipe: Recipe, args: argparse.Namespace) -> tuple[float, float]:
    """The median seconds of a step: by the clock, of CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = resolve_ds_config({"zero_optimization": {"stage": args.zero}}, recipe, 1, device)
    engine = ZeroEngine(roberta(args), config, recipe.optimizer)
    mask = GradientMask(engine.module, recipe.mask, seed=0) if name == "migu" else None
    methods: list[Method] = []
    if name == "kd":
        kd = Distill(replace(recipe, kd=DistillSettings()))
        frozen = roberta(args)
        nowhere = Path(".")
        tokenizer: Any = None
        kd.prepare(
            Start(1, recipe, tokenizer, lambda _: Teacher(lambda: frozen, dict), lambda *_: (),
                  nowhere, nowhere, None, engine)
        )  # fmt: skip
        methods = [kd]
    if name == "das":
        das = Das(replace(recipe, das=DasSettings()))
        das._engine = engine
        das._use({gate.key: torch.rand(gate.size) for gate in gates_of(engine.module)})
        methods = [das]
    engine.start_stage(sum(method.micro_batches() for method in methods))
    log: Any = Seconds()
    train_stage(engine, mask, batches(args), recipe, 1, args.steps, log, methods=methods)
    engine.close()
    clock, cpu = zip(*log.steps[2:], strict=True)
    return statistics.median(clock), statistics.median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--zero", type=int, default=2, help="ZeRO stage")
    add_sizes(parser, layers=2, length=164)
    parser.add_argument("--steps", type=int, default=12, help="of a method in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    start_distributed()
    recipe = load_recipe("demo", [f"train.batch_size={args.batch}"])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in args.methods}
    for _ in range(args.rounds):  # in turn: what else the machine does falls on all of them
        for name in args.methods:
            seconds[name].append(measure(name, recipe, args))
    medians = {
        name: [statistics.median(each) for each in zip(*found, strict=True)]
        for name, found in seconds.items()
    }
    first = medians[args.methods[0]]
    for name, (clock, cpu) in medians.items():
        print(
            f"{name}: step {clock * 1000:.1f} ms, {clock / first[0] - 1:+.1%}; "
            f"CPU {cpu * 1000:.1f} ms, {cpu / first[1] - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
