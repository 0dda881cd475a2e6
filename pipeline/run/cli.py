"""What every command does alike: arguments, and a message instead of a traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import TrainingStopped, UserError


def training_parser(description: str, recipe: str, examples: str) -> argparse.ArgumentParser:
    """The arguments of the training commands; `recipe` is the default one."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n{examples}",
    )
    parser.add_argument(
        "--config",
        metavar="JSON",
        help='DeepSpeed configuration; "auto" is filled from the recipe (default: '
        "ds_configs/zero2.json; none with engine.kind=fsdp)",
    )
    parser.add_argument(
        "--recipe",
        default=recipe,
        metavar="YAML",
        help="what to train: a file, or a name from launch/recipes (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        default="runs",
        metavar="DIR",
        help="where run folders go: DIR/<name> (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print what would be done and the memory, and stop",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete an earlier run of this name instead of continuing it",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe settings, e.g. mask.threshold=0.5 stages[0].steps=50",
    )
    return parser


def run_command(main: Callable[[], None]) -> NoReturn:
    """Call `main`; what a user can do something about is a message on rank 0, not a traceback.

    Exit codes: 2 for a UserError, 1 for TrainingStopped, 130 for Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        _leave(f"error: {error}", 2)
    except TrainingStopped as error:
        _leave(f"stopped: {error}. The stages that were published are unharmed.", 1)
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to continue", 130)
    sys.exit(0)


def _leave(message: str, code: int) -> NoReturn:
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
