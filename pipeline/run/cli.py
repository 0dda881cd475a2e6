"""What every command does alike: arguments, and a message instead of a traceback."""

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.errors import RETRY, Interrupted, RankLost, TrainingStopped, UserError, advice
from pipeline.redact import redact
from pipeline.run.surroundings import read_and_write_utf8, use_caches_that_exist


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
        "--measure",
        action="store_true",
        help="also train three steps on random tokens, say how long the run would take, and stop",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete an earlier run of this name instead of continuing it",
    )
    # What launchers add, each in its own spelling; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe settings, e.g. mask.threshold=0.5 stages[0].steps=50",
    )
    return parser


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports that take seconds. The garbage collector walks what they make again and
    again, a fifth of their time, and would in each of its full collections from then on."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_command(main: Callable[[], None]) -> NoReturn:
    """Call `main`; what a user can do something about is one message, not a traceback.

    Rank 0 speaks for all; an error of another rank alone is printed by that rank, with its number.
    Exit codes: 2 for a UserError, 1 for TrainingStopped, RETRY where the same command goes on: a
    rank is gone, or the run was asked to end; 130 for Ctrl-C before it could be. Where a rank has
    ended with a message or a traceback, the others end with its code.
    """
    read_and_write_utf8()
    use_caches_that_exist()
    sys.excepthook = _show_traceback
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has had enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        _leave(error, f"error: {error}", 2)
    except Interrupted as error:
        _interrupted(error)
    except RankLost as error:
        _left_alone(error)
    except TrainingStopped as error:
        _leave(error, f"stopped: {error}. The stages that were published are unharmed.", 1)
    except OSError as error:
        if (help_ := advice(error)) is None:
            _tell_the_others(error)
            raise
        _leave(error, f"error: {error}. {help_}, and run the same command again.", 2)
    except KeyboardInterrupt:
        _leave(None, "interrupted; run the same command again to continue", 130)
    except RuntimeError as error:
        heart = _heart()
        if not any(sign in str(error) for sign in LOST):
            _tell_the_others(error)
            raise
        _left_alone(heart.lost() if heart else RankLost("another rank is gone"))
    except Exception as error:
        _tell_the_others(error)
        raise
    if distributed := sys.modules.get("pipeline.engine.distributed"):
        distributed.leave_group()
    sys.exit(0)


def _show_traceback(*error: Any) -> None:
    print(redact("".join(traceback.format_exception(*error))), file=sys.stderr, end="", flush=True)


# How gloo and NCCL say, in a collective, that another rank is not there any more.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process")


def _asked() -> str | None:
    """Whether this rank was to end; `pipeline.signals` is not imported for the sake of --help."""
    signals: Any = sys.modules.get("pipeline.signals")
    return signals and signals.asked()


def _heart() -> Any:
    """This rank's heartbeat; None where nobody waits for it."""
    heartbeat: Any = sys.modules.get("pipeline.heartbeat")
    return heartbeat and heartbeat.mine()


def _tell_the_others(error: Exception) -> None:
    """Of a fault, which starting again would meet again: they end with its code too."""
    if heart := _heart():
        first = next(iter(str(error).splitlines()), "")
        heart.leave(f"{type(error).__name__}: {first}", 1, not getattr(error, "everywhere", False))


def _left_alone(error: RankLost) -> NoReturn:
    """Another rank is gone: with its code, where it has ended with a message."""
    if _asked():
        _interrupted(error)
    again = ". Run the same command again to continue." if error.code == RETRY else ""
    _leave(error, f"stopped: {error}{again}", error.code)


def _interrupted(error: Exception) -> NoReturn:
    """Every rank was to end, so rank 0 alone says it."""
    error.everywhere = True  # type: ignore[attr-defined]
    reason = _asked() or error
    _leave(error, f"interrupted ({reason}); run the same command again to continue", RETRY)


def _leave(error: Exception | None, message: str, code: int) -> NoReturn:
    """End this process with a message, printed once for all the ranks that have the same."""
    rank = int(os.environ.get("RANK", 0))
    alone = error is not None and not getattr(error, "everywhere", False)
    if heart := _heart():
        heart.leave(message, code, alone)
    if rank > 0:
        if not alone:
            sys.exit(code)  # rank 0 prints it
        # Where rank 0 and the ranks before this one fail alike, the launcher ends this one first.
        time.sleep(3 + 2 * int(os.environ.get("LOCAL_RANK", 0)))
        message = f"rank {rank}: {message}"
    print(redact(message), file=sys.stderr, flush=True)
    sys.exit(code)
