"""Whether stages leak: resident memory of a rank after each of ten stages in one process.

  torchrun --nproc-per-node 2 benchmarks/stage_memory.py [--engine zero3] [--new]

Prints, for rank 0, the memory after each stage in one engine; with --new each stage makes an engine
of its own and closes it, as a method does that changes what is trained.
"""

import argparse
import ctypes
import gc
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.engine.config import resolve_ds_config, resolve_fsdp_config
from pipeline.engine.fsdp import FsdpEngine
from pipeline.engine.zero import ZeroEngine, start_distributed
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import world_size
from pipeline.recipe import Data, Domain, Engine, Model, Recipe, Stage, Train
from pipeline.run.train import train_stage

STAGES, STEPS = 10, 3


def resident() -> float:
    """MB of this process in memory, after what is free has been given back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [x for x in lines if x.startswith("VmRSS:")]
    return int(line.split()[1]) / 1e3


def make_engine(recipe: Recipe) -> ZeroEngine | FsdpEngine:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4000, num_attention_heads=8, **sizes)).train()
    if recipe.engine.kind == "fsdp":
        config = resolve_fsdp_config(recipe, world_size(), "cpu")
        return FsdpEngine(model, config, recipe.optimizer)
    zero = {"zero_optimization": {"stage": int(recipe.name[-1])}}
    return ZeroEngine(model, resolve_ds_config(zero, recipe, world_size(), "cpu"), recipe.optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = ["zero0", "zero1", "zero2", "zero3", "fsdp"]
    parser.add_argument("--engine", choices=engines, default="zero3")
    parser.add_argument("--new", action="store_true", help="an engine of its own for each stage")
    args = parser.parse_args()
    start_distributed()
    recipe = Recipe(
        name=args.engine,
        model=Model(path="unused", objective="causal"),
        data=Data(domains={"x": Domain(embedded="prose")}, sequence_length=64),
        stages=[Stage("x", steps=STEPS)],
        train=Train(batch_size=2 * world_size(), micro_batch_size=2),
        engine=Engine("fsdp" if args.engine == "fsdp" else "deepspeed"),
    )
    engine = make_engine(recipe)
    found = []
    for stage in range(STAGES):
        if args.new and stage:
            engine = make_engine(recipe)
        engine.start_stage()
        mask = GradientMask(engine.module, recipe.mask, seed=stage)
        ids = torch.randint(4000, (2, 64))
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        train_stage(engine, mask, iter([[batch]] * STEPS), recipe, 1, STEPS, log=None)
        mask.close()
        del mask
        if args.new:
            engine.close()
            del engine
        found.append(resident())
    if dist.get_rank() == 0:
        numbers = "  ".join(f"{x:,.0f}" for x in found)
        print(f"MB after each stage: {numbers}; last over second {found[-1] / found[1]:.3f}")


if __name__ == "__main__":
    main()
