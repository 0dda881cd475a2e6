"""What the mask adds to a training step: steps with and without it, in turn, on one model.

    python benchmarks/mask_cost.py --engines zero2 fsdp --hidden 768 --layers 2

Prints, per engine, the median step without the mask and the median, over pairs of neighbouring
steps, of the ratio with / without. Times of whole steps: forward, backward, mask, optimizer.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch
from roberta import add_sizes, roberta, setting
from torch.nn import functional as F

from pipeline.engine.config import resolve_ds_config, resolve_fsdp_config
from pipeline.engine.distributed import start_distributed
from pipeline.engine.fsdp import FsdpEngine
from pipeline.engine.zero import ZeroEngine
from pipeline.migu.gradient_mask import GradientMask
from pipeline.recipe import Mask
from pipeline.run.recipe_file import load_recipe


def measure(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """(median seconds of a dense step, median ratio of a masked step to its neighbour)."""
    recipe = load_recipe("demo", [f"train.batch_size={args.batch}"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = roberta(args)
    engine: ZeroEngine | FsdpEngine
    if name == "fsdp":
        engine = FsdpEngine(model, resolve_fsdp_config(recipe, 1, device), recipe.optimizer)
    else:
        zero = {"zero_optimization": {"stage": int(name.removeprefix("zero"))}}
        config = resolve_ds_config(zero, recipe, 1, device)
        engine = ZeroEngine(model, config, recipe.optimizer)
    settings = Mask(threshold=args.threshold, update=args.update)
    mask = GradientMask(engine.module, settings, seed=0)
    ids = torch.randint(5, args.vocabulary, (args.batch, args.length), device=engine.device)

    def step(masked: bool, number: int) -> float:
        start = time.perf_counter()
        with mask.recording() if masked else nullcontext():
            logits = engine.forward(input_ids=ids).logits
        engine.backward(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), last=True)
        if masked:
            mask.apply(engine.shards, number)
        engine.step(1e-5, hold=partial(mask.hold, engine.shards) if masked else nullcontext)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for masked in (False, True, False, True):
        step(masked, 0)
    pairs = []
    for i in range(args.pairs):  # every second pair the other way round
        order = (False, True) if i % 2 == 0 else (True, False)
        times = {masked: step(masked, i) for masked in order}
        pairs.append((times[False], times[True]))
    mask.close()
    engine.close()
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] / p[0] for p in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["zero0", "zero1", "zero2", "zero3", "fsdp"]
    parser.add_argument("--engines", nargs="+", default=names, choices=names)
    parser.add_argument("--update", default="gradient", choices=["gradient", "strict"])
    add_sizes(parser)
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--pairs", type=int, default=20, help="timed pairs of steps")
    args = parser.parse_args()
    start_distributed()
    print(setting(args))
    for name in args.engines:
        dense, ratio = measure(name, args)
        print(f"{name}: dense step {dense * 1000:.1f} ms, with the mask x {ratio:.3f}")


if __name__ == "__main__":
    main()
