"""Read and tokenize the corpora of a recipe, so that its runs start without reading anything.

Needs no accelerator. On a cluster, start it on as many nodes as should share the work: all of them
need to see the same folder (data.prepared). A corpus that is there already is checked byte by byte.

python launch/prepare.py --recipe smollm2_code
"""

import argparse
import os
import sys

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.run.cli import run_command

EXAMPLES = """\
  python launch/prepare.py --recipe smollm2_code
  python launch/prepare.py --recipe mine.yaml data.prepared=/scratch/prepared
  python launch/prepare.py --recipe mine.yaml --dry-run
  srun --nodes 8 --ntasks-per-node 1 python launch/prepare.py --recipe mine.yaml"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n{EXAMPLES}",
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="YAML",
        help="whose domains to prepare: a file, or a name from launch/recipes",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print how much text and disk each domain takes, and stop",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe settings, e.g. data.prepared=/scratch/prepared",
    )
    args = parser.parse_intermixed_args()

    from pipeline.run.prepare_recipe import prepare_recipe
    from pipeline.run.recipe_file import load_recipe

    prepare_recipe(load_recipe(args.recipe, args.overrides), args.dry_run)


if __name__ == "__main__":
    run_command(main)
