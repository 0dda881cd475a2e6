"""Which output features a checkpoint makes large on each domain, and which rows would be kept.

python launch/inspect.py --checkpoint runs/toy_tasks/stages/*/checkpoint \\
    --heldout runs/toy_tasks/heldout
"""

import os
import sys

# The project's folder instead of this one, whose files would hide libraries of the same names:
# this one the standard library's `inspect`.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
from pathlib import Path

from pipeline.run.cli import run_command


def main() -> None:
    args = _parser().parse_args()

    from functools import partial

    from eval.analysis.magnitudes import Layer, choose
    from eval.measure.checkpoint import objective_of
    from eval.measure.lm import check_tokens
    from eval.measure.magnitudes import magnitudes_of
    from eval.report.magnitude_page import write_magnitudes
    from pipeline.data.tokenizer import load_tokenizer
    from pipeline.errors import UserError
    from pipeline.model.load import load_for_evaluation

    if not (args.heldout / "manifest.json").is_file():
        raise UserError(
            f"--heldout {args.heldout}: not a held-out folder (no manifest.json); give the "
            "`heldout` folder of a run"
        )
    if not 0 <= args.threshold < 1:
        raise UserError(f"--threshold {args.threshold}: must be at least 0 and below 1")
    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: must be at least 1")
    shown = {}
    for checkpoint, name in zip(args.checkpoint, _names(args.checkpoint), strict=True):
        check_tokens(args.heldout, checkpoint, partial(load_tokenizer, checkpoint))
        model = load_for_evaluation(checkpoint, objective_of(args.heldout), args.attention)
        measured = magnitudes_of(model, args.heldout, args.domains, args.samples)
        layers = [Layer(*found) for found in measured]
        shown[name] = layers, choose(layers, args.layer)
    page = write_magnitudes(shown, args.threshold, args.samples, args.output)
    print(f"page: {page}")


def _names(checkpoints: list[str]) -> list[str]:
    """The stage's folder, of a checkpoint in a run; with the run's, where that does not tell them
    apart, or what was given."""
    from pipeline.errors import UserError

    if len(set(checkpoints)) < len(checkpoints):
        raise UserError("--checkpoint: one is given twice")
    folders = [Path(c).absolute() for c in checkpoints]
    for places in (slice(-2, -1), slice(-4, -1, 2)):  # the stage; the run and the stage
        names = [
            "/".join(folder.parts[places]) if folder.name == "checkpoint" else given
            for folder, given in zip(folders, checkpoints, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return checkpoints


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, help="folders or hub ids, e.g. before and after")
    add("--heldout", type=Path, required=True, metavar="DIR", help="the `heldout` folder of a run")
    add("--domains", nargs="+", metavar="NAME", help="of it (default: all)")
    add("--layer", metavar="NAME", help="a masked linear (default: the last block's first FFN one)")
    add("--samples", type=int, default=100, help="sequences of each domain (default: 100)")
    add("--threshold", type=float, default=0.7, help="fraction of the rows masked (default: 0.7)")
    add("--attention", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"))
    add("--output", type=Path, default=Path("inspected"), metavar="DIR", help="of the page")
    return parser


if __name__ == "__main__":
    run_command(main)
