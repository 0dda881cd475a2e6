"""Repair a checkpoint after training, without training: move it back toward what it came from.

python launch/repair.py runs/demo --grid 0.1,0.2,0.3,0.4,0.5 --out repaired
python launch/repair.py runs/demo/stages/01_math/checkpoint --share 0.3 --out repaired
python launch/repair.py my_model --toward HuggingFaceTB/SmolLM2-135M --dg-hard --out repaired
"""

import os
import sys

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
from pathlib import Path

from pipeline.run.cli import run_command

GRID = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"


def main() -> None:
    args = _parser().parse_args()
    grid = args.share is None and not args.dg_hard
    shares = [] if args.dg_hard else _shares(args.share or args.grid or GRID)
    _check(args, grid)

    from functools import partial
    from tempfile import TemporaryDirectory

    from eval import repair
    from pipeline.errors import UserError
    from pipeline.methods.repair import Edit, hard_threshold, interpolate

    task = repair.find(args.checkpoint, args.toward, args.heldout)
    if grid and task.heldout is None:
        raise UserError(
            "--heldout is missing: a grid is measured on the held-out text of a run; give its "
            "folder, or choose a share yourself with --share"
        )
    edit: Edit = hard_threshold
    what, losses = "dg-hard", {}
    with TemporaryDirectory() as temporary:
        base = repair.base_in_files(task, Path(temporary))
        if task.heldout is not None:
            losses = repair.measure_shares(task, base, shares, args.batch_size)
        if not args.dg_hard:
            best = repair.best_of(repair.trade_offs(losses, task.trained))
            if grid and args.out is not None and best is None:
                raise UserError(
                    "there is no best trade-off: the held-out text needs a domain that was trained "
                    "and one that was not; choose a share yourself with --share"
                )
            what = best.what if grid and best is not None else f"{shares[0]:g}"
            edit = partial(interpolate, share=float(what))
        if args.out is not None:
            repair.write(task, base, edit, what, args.out)
    if args.dg_hard and task.heldout is not None:
        repaired = repair.measure_folder(task, args.out, args.batch_size)
        losses = {"0": losses["0"], what: repaired, "1": losses["1"]}
    if losses:
        print(f"{task.checkpoint} toward {task.base}, on {task.heldout}, nats per token:")
        print(repair.table(repair.trade_offs(losses, task.trained)))
    if args.out is not None:
        print(f"repaired checkpoint ({what}): {args.out}")


def _check(args: argparse.Namespace, grid: bool) -> None:
    """Raises UserError for what cannot be before anything is loaded."""
    from pipeline.errors import UserError

    if args.out is None and not grid:
        raise UserError("--out is missing: the folder of the repaired checkpoint")
    if args.share is not None and "," in args.share:
        raise UserError(f"--share {args.share}: give one; --grid measures several")
    if args.out is not None and args.out.exists():
        raise UserError(f"--out {args.out}: it is there already; name a new folder, or delete it")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")


def _shares(text: str) -> list[float]:
    """Raises UserError where one is no number between 0 and 1."""
    from pipeline.errors import UserError

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text}: write shares as numbers: --share 0.3, --grid 0.1,0.2") from None
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(
            f"{text}: a share of the base is between 0 (the checkpoint) and 1 (the base)"
        )
    return shares


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of a checkpoint, or of a run (its last stage)")
    add(
        "--toward",
        metavar="BASE",
        help="folder, hub id or .gguf file of the model it was trained from (default: what its "
        "run started from)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--share", metavar="S", help="interpolate (WiSE-FT) to this share of the base")
    how.add_argument(
        "--grid",
        metavar="S,S,...",
        help=f"measure these shares and take the best trade-off (default: {GRID})",
    )
    how.add_argument(
        "--dg-hard",
        action="store_true",
        help="drop the singular values of each update that noise explains",
    )
    add(
        "--heldout",
        type=Path,
        metavar="DIR",
        help="a run's folder, whose held-out text to measure on (default: the checkpoint's run)",
    )
    add("--out", type=Path, metavar="DIR", help="where to write the repaired checkpoint (a grid "
        "without it only prints the table)")  # fmt: skip
    add("--batch-size", type=int, default=32, help="sequences (default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
