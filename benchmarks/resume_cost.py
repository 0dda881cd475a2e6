"""What resume checkpoints cost: a loop that saves every so many steps against the loop without.

    python benchmarks/resume_cost.py --every 20 --rounds 6

Prints the ratio of the times of `every` steps with one save among them and without, in turn, by the
clock and in seconds of the CPU, the thread that writes included (what it costs where no core is
idle; another program on the machine changes it little); how long a step waits for a save, and how
long a save takes alone; and its size. How long it takes to be at a position of the data:
data_order.py --seek.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from roberta import add_sizes, roberta, setting
from torch.nn import functional as F

from pipeline.engine.config import resolve_ds_config
from pipeline.engine.zero import ZeroEngine
from pipeline.recipe import Resume
from pipeline.run.recipe_file import load_recipe
from pipeline.run.saver import Saver
from pipeline.run.stage_state import StageState


class NoData:
    """The position of data that has none."""

    def state_dict(self) -> dict:
        return {}


def saving(args: argparse.Namespace) -> None:
    recipe = load_recipe("demo", [f"train.batch_size={args.batch}", "train.precision=fp32"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    zero = {"zero_optimization": {"stage": args.stage}}
    engine = ZeroEngine(roberta(args), resolve_ds_config(zero, recipe, 1, device), recipe.optimizer)
    ids = torch.randint(5, args.vocabulary, (args.batch, args.length), device=engine.device)
    waited: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saver = Saver(Path(folder), Resume(), StageState(engine, NoData()))

        def steps(number: int, save: bool) -> float:
            start = time.perf_counter()
            for step in range(args.every):
                logits = engine.forward(input_ids=ids).logits
                engine.backward(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), last=True)
                engine.step(1e-4)
                if save and step == 0:
                    since = time.perf_counter()
                    saver.save(number)
                    waited.append(time.perf_counter() - since)
            return time.perf_counter() - start

        steps(0, save=True)  # the buffers are made
        saver.finish()
        waited.clear()
        pairs = []
        for i in range(args.rounds):
            order = (True, False) if i % 2 else (False, True)
            times, cpu = {}, {}
            for save in order:
                since = time.process_time()
                times[save] = steps(i + 1, save)
                saver.finish()  # outside: each half pays for itself alone
                cpu[save] = time.process_time() - since
            pairs.append((times[True], times[False], cpu[True], cpu[False]))
        since = time.perf_counter()
        saver.save(args.rounds + 1)
        saver.finish()
        alone = time.perf_counter() - since
        [newest, *_] = sorted(Path(folder).glob("step-*"), reverse=True)
        size = sum(p.stat().st_size for p in newest.iterdir())
    ratio = statistics.median(a / b for a, b, _, _ in pairs)
    work = statistics.median(a / b for _, _, a, b in pairs)
    without = statistics.median(b for _, b, _, _ in pairs)
    print(
        f"{setting(args)}\n{args.every} steps: {without:.2f} s without; with one save x "
        f"{ratio:.3f}, in CPU seconds x {work:.3f}\n"
        f"a save: {size / 1e6:.0f} MB, {alone:.2f} s alone, of which a step waits "
        f"{statistics.median(waited):.3f} s ({statistics.median(waited) / alone:.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--stage", type=int, default=2)
    add_sizes(parser, hidden=256, vocabulary=8000)
    parser.add_argument("--folder", help="where to save; default: among the temporary files")
    saving(parser.parse_args())


if __name__ == "__main__":
    main()
