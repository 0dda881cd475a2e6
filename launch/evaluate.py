"""Held-out loss of a checkpoint on every domain of a run (and the rows that domains share).

    python launch/evaluate.py --checkpoint runs/demo/stages/01_math/checkpoint \
        --heldout runs/demo/heldout
"""

import argparse
from pathlib import Path

from pipeline.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder or hub id of the model")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument(
        "--heldout",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's heldout folder: text and masks",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write this process' share here (.npz) instead of printing the result",
    )
    parser.add_argument(
        "--share",
        default="0/1",
        metavar="R/N",
        help="evaluate batches R, R + N, ... only (default: all)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="sequences (default: 32)")
    parser.add_argument(
        "--attention", default="sdpa", choices=("sdpa", "eager", "flash_attention_2")
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--no-overlap", action="store_true", help="do not compare kept rows")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.7,
        help="of the kept rows that are compared (default: 0.7)",
    )
    args = parser.parse_args()

    import json
    import tempfile
    import time

    import torch

    from eval.lm import evaluate_share, merge_shares
    from pipeline.errors import UserError

    if not (args.heldout / "manifest.json").is_file():
        raise UserError(f"--heldout {args.heldout}: not a held-out folder (no manifest.json)")
    share = tuple(int(x) for x in args.share.split("/"))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        output = args.output or Path(folder) / "share.npz"
        evaluate_share(
            args.checkpoint,
            args.heldout,
            output,
            share,
            args.batch_size,
            not args.no_overlap,
            args.attention,
            device,
            args.revision,
        )
        if args.output is None:
            result = Path(folder) / "eval.json"
            info = {"checkpoint": args.checkpoint, "started": started}
            merge_shares([output], args.heldout, result, args.threshold, info)
            print(json.dumps(json.loads(result.read_text()), indent=2))


if __name__ == "__main__":
    run_command(main)
