"""Share a checkpoint of a run on the hub, with a model card of what it learned and forgot.

python launch/publish.py runs/code --to me/code-model --license apache-2.0 --dry-run
python launch/publish.py runs/code --to me/code-model --license apache-2.0
"""

import argparse
import os
import sys
from pathlib import Path

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.run.cli import run_command


def main() -> None:
    args = _parser().parse_args()

    from eval.publish import check_name, upload, write_folder
    from pipeline.errors import UserError

    if args.to:
        check_name(args.to)
    elif not args.dry_run:
        raise UserError("--to is missing: the repository, as owner/name; or give --dry-run")
    folder = write_folder(args.run, args.stage, args.license, args.language, args.merge, args.out)
    print(f"folder: {folder}")
    if not args.dry_run:
        print(f"published: {upload(folder, args.to, args.private)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/publish.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, e.g. runs/code")
    add("--to", metavar="OWNER/NAME", help="the model repository; made where it is not there")
    add("--license", required=True, help="of the weights, e.g. apache-2.0: that of the base allows")
    add("--language", nargs="+", default=[], metavar="CODE", help="of the text, e.g. en de")
    add("--stage", type=int, metavar="N", help="the model after stage N (default: the last)")
    add("--merge", action="store_true", help="merge an adapter into its base")
    add("--private", action="store_true", help="of a repository that is made")
    add("--out", type=Path, metavar="DIR", help="(default: RUN/publish/stage_NN)")
    add("--dry-run", action="store_true", help="write the folder only")
    return parser


if __name__ == "__main__":
    run_command(main)
