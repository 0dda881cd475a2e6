"""What the anchor adds to a training step: plain fine-tuning, cached and live anchors, and one
beside MIGU with a row-sparse backward (T = 0.7), in turn.

    python benchmarks/anchor_cost.py --layers 4

Prints, per way, the median over rounds of its step's time over that of the plain step beside it,
and the peak memory of a process that trains that way alone. Whole steps: forward, backward,
optimizer.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from roberta import add_sizes, roberta, setting
from torch.nn import functional as F

from pipeline.engine.config import resolve_ds_config
from pipeline.engine.distributed import start_distributed
from pipeline.engine.zero import ZeroEngine
from pipeline.methods.anchor import Anchor
from pipeline.methods.method import Start, Teacher
from pipeline.migu.gradient_mask import GradientMask
from pipeline.model.attention import separation_of
from pipeline.model.load import PredictedPositions, predict
from pipeline.recipe import Mask
from pipeline.run.recipe_file import load_recipe
from pipeline.run.train import extra_backwards

WAYS = {
    "plain": None,
    "cached, r = 0.125": {"fraction": 0.125},
    "cached, r = 0.25": {"fraction": 0.25},
    "live, r = 0.125": {"fraction": 0.125, "cache": 0},
    "live, r = 0.25": {"fraction": 0.25, "cache": 0},
    "cached, r = 0.125, row_sparse": {"fraction": 0.125},
}


class Tokens:
    """As much of a tokenizer as random text takes."""

    def __init__(self, vocabulary: int):
        self.all_special_ids = list(range(5))
        self.mask_token_id, self.cls_token_id, self.sep_token_id = 4, 0, 2
        self.backend_tokenizer, self._vocabulary = self, vocabulary

    def to_str(self) -> str:
        return ""

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._vocabulary)}

    def __len__(self) -> int:
        return self._vocabulary


def step_of(way: str, args: argparse.Namespace, folder: Path) -> Callable[[int], float]:
    """A function that does step 1... and returns its seconds."""
    settings = WAYS[way]
    anchor_key = (
        "null" if settings is None else json.dumps({"tokens": 40_000, "text": "random", **settings})
    )
    recipe = load_recipe(
        "demo",
        [f"train.batch_size={args.batch}", f"train.micro_batch_size={args.batch}",
         f"data.sequence_length={args.length}", "mask.enabled=false",
         f"anchor={anchor_key}"],
    )  # fmt: skip
    model = roberta(args)
    separation = separation_of(model, recipe)
    teacher = copy.deepcopy(model).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    zero = resolve_ds_config({"zero_optimization": {"stage": 2}}, recipe, 1, device)
    engine = ZeroEngine(model, zero, recipe.optimizer)
    anchor = None
    if settings is not None:
        anchor = Anchor(recipe)
        tokenizer = Tokens(args.vocabulary)
        known = Teacher(lambda: teacher, lambda: {"way": way})
        start = Start(0, recipe, tokenizer, lambda _: known,  # type: ignore[arg-type]
                      lambda *_: [], folder, folder, separation, engine)  # fmt: skip
        anchor.begin(start)
        anchor.prepare(start)
    if settings is None or settings.get("cache") != 0:
        del teacher
    engine.start_stage(anchor.micro_batches() if anchor else 0)
    head = PredictedPositions(engine.module)
    mask = None
    if way.endswith("row_sparse"):
        mask = GradientMask(engine.module, Mask(backward="row_sparse"), seed=0)
    hold = partial(mask.hold, engine.shards) if mask else nullcontext
    generator = np.random.default_rng(0)
    ids = torch.from_numpy(generator.integers(5, args.vocabulary, (args.batch, args.length)))
    wanted = torch.from_numpy(generator.random(ids.shape) < 0.15).to(engine.device)
    ids = ids.to(engine.device)

    def step(number: int) -> float:
        begun = time.perf_counter()
        extras = [(anchor, b) for b in anchor.batches(number)] if anchor else []
        with mask.recording() if mask else nullcontext():
            logits = predict(engine.forward, {"input_ids": ids}, wanted, head)
        if mask:
            mask.select(engine.shards, number)
        loss = F.cross_entropy(logits, ids[wanted]) * engine.micro_batches
        engine.backward(loss, last=not extras)
        extra_backwards(engine, head, extras, mask)
        if mask:
            mask.apply(engine.shards, number, False)
        engine.step(1e-5, hold=hold)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return step


def peak_memory(way: str) -> float:
    """GB of a process of its own that takes two steps."""
    command = [sys.executable, *sys.argv, "--alone", way]
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
    alone = {k: v for k, v in os.environ.items() if k not in launcher}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=alone)
    return float(found.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each way")
    parser.add_argument("--alone", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    start_distributed()
    with tempfile.TemporaryDirectory() as name:
        if args.alone:
            step = step_of(args.alone, args, Path(name))
            step(1), step(2)
            status = Path("/proc/self/status").read_text()  # getrusage's has the parent's in it
            print(int(status.split("VmHWM:")[1].split()[0]) / 1e6)
            return
        print(setting(args))
        steps = {way: step_of(way, args, Path(name)) for way in WAYS}
        for number in (1, 2):
            for step in steps.values():
                step(number)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(3, 3 + args.rounds):
            ways = list(WAYS) if number % 2 else list(WAYS)[::-1]
            for way in ways:
                times[way].append(steps[way](number))
        for way in WAYS:
            ratios = [t / plain for t, plain in zip(times[way], times["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = statistics.median(times[way]) * 1000
            print(f"{way}: {milliseconds:.0f} ms, x {middle:.2f} of the plain step "
                  f"({low:.2f} to {high:.2f}), {peak_memory(way):.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
