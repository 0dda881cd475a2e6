"""What training keeps of the masked weights with rows per stage, against dense training.

    python benchmarks/state_memory.py --shape smollm2-135m --engines zero2 fsdp

Takes one step of the shape and counts the bytes of gradients, fp32 masters and moments that exist
while the optimizer updates the weights; without those of the weights that no mask has. Their share
of the dense ones should be 1 - T.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from step_time import SHAPES, engine_of, steps_of
from torch import Tensor

from pipeline.engine.distributed import start_distributed
from pipeline.migu.targets import find_targets


def state_bytes(args: argparse.Namespace, split: bool) -> tuple[int, int]:
    """Of all weights that are trained, and of those that no mask has (the same ones in a split
    model, for which it is 0)."""
    engine = engine_of(args, "cpu", split)
    masked = {id(t.weight) for t in find_targets(engine.module)} if not split else set()
    rest = sum(p.numel() for p in engine.module.parameters() if id(p) not in masked)
    adam = engine._adam if hasattr(engine, "_adam") else engine._optimizer
    found = 0

    @contextmanager
    def counted(_names: Any) -> Iterator[None]:  # ZeRO updates one group of weights after the other
        nonlocal found
        yield
        for p in chain.from_iterable(group["params"] for group in adam.param_groups):
            if p.grad is not None:
                moments = [t for t in adam.state[p].values() if torch.is_tensor(t) and t.dim()]
                found += sum(_bytes(t) for t in (p.detach(), p.grad, *moments))

    [batch] = steps_of(args, 1)[0]
    engine.backward(engine.forward(**batch).loss, last=True)
    engine.step(1e-5, hold=counted)
    engine.close()
    return found, 0 if split else rest * 4 * 4  # a gradient, a master and two moments in fp32


def _bytes(tensor: Any) -> int:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--engines", nargs="+", default=["zero2", "fsdp"])
    parser.add_argument("--threshold", type=float, default=0.7)
    args = parser.parse_args()
    args.accumulation, args.checkpointing, args.precision = 1, True, "fp32"
    args.chunked_loss = False
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start_distributed()
    for engine in args.engines:
        args.engine = engine
        (dense, rest), (split, _) = (state_bytes(args, split) for split in (False, True))
        share = (split - rest) / (dense - rest)
        print(f"{args.shape}, {engine}: gradients, masters and moments of the masked weights "
              f"{(dense - rest) / 1e9:.3f} GB dense, {(split - rest) / 1e9:.3f} GB with rows per "
              f"stage: {share:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
