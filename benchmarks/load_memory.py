"""Host memory that a rank takes to load a pretrained model and to start an engine with it.

  torchrun --nproc-per-node 2 benchmarks/load_memory.py FOLDER --engine zero3

Prints, for rank 0, the growth of private memory (pages of no file, in no other process) after
loading, its peak until the engine has started, and after that.
"""

import argparse
import threading
from pathlib import Path

import torch.distributed as dist

from pipeline.engine.config import resolve_ds_config, resolve_fsdp_config
from pipeline.engine.distributed import start_distributed
from pipeline.engine.fsdp import FsdpEngine
from pipeline.engine.zero import ZeroEngine
from pipeline.model.load import build_model, load_config
from pipeline.recipe import Data, Domain, Engine, Model, Recipe, Stage, Train


def private() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    [line] = [x for x in lines if x.startswith("Anonymous:")]
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            self.bytes = max(self.bytes, private())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="of a causal model, or its hub id")
    engines = ["zero0", "zero1", "zero2", "zero3", "fsdp"]
    parser.add_argument("--engine", choices=engines, default="zero3")
    parser.add_argument("--convert", action="store_true", help="load everything in fp32")
    args = parser.parse_args()
    start_distributed()
    recipe = Recipe(
        name="memory",
        model=Model(path=args.folder, objective="causal"),
        data=Data(domains={"x": Domain(embedded="prose")}),
        stages=[Stage("x", steps=1)],
        train=Train(batch_size=dist.get_world_size(), micro_batch_size=1, precision="bf16"),
    )
    before = private()
    peak = Peak()
    peak.start()
    config = load_config(recipe.model)
    model = build_model(recipe.model, config, None, 0, keep_dtype=not args.convert)
    loaded = private()
    if args.engine == "fsdp":
        recipe.engine = Engine("fsdp")
        settings = resolve_fsdp_config(recipe, dist.get_world_size(), "cpu")
        engine = FsdpEngine(model, settings, recipe.optimizer)
    else:
        zero = {"zero_optimization": {"stage": int(args.engine[-1])}}
        settings = resolve_ds_config(zero, recipe, dist.get_world_size(), "cpu")
        engine = ZeroEngine(model, settings, recipe.optimizer)
    peak.stop.set()
    peak.join()
    if dist.get_rank() == 0:
        numbers = {"loaded": loaded, "peak": max(peak.bytes, private()), "started": private()}
        print("  ".join(f"{k} {(v - before) / 1e6:,.0f} MB" for k, v in numbers.items()))
    engine.close()


if __name__ == "__main__":
    main()
