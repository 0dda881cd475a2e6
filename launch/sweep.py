"""Many runs over a grid of settings and seeds, and one page that compares them.

python launch/sweep.py --recipe demo --grid optimizer.lr=5e-4,1e-3,2e-3 --seeds 3
python launch/sweep.py --recipe demo_methods
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.run.cli import run_command

EPILOG = """\
A sweep is a recipe with --grid and --seeds, or a file of launch/recipes/sweeps (methods, each with
a grid of its own). Its folder is DIR/<recipe>_sweep: runs, logs, sweep.json. The same command again
does what is left: finished runs are not started, failed ones are tried again. On a Slurm cluster
--cluster slurm submits the runs as one array job (needs submitit). docs/sweeps.md"""


def main() -> None:
    args = _parser().parse_intermixed_args()

    from functools import partial

    import torch

    from pipeline.progress import say
    from pipeline.run import sweep as sweeps
    from pipeline.run import sweep_runs

    sweep = _sweep(args)
    points = sweeps.sweep_points(sweep, args.overrides)
    folder = Path(args.runs) / (args.sweep or f"{Path(args.recipe).stem}_sweep")
    gpus = torch.cuda.device_count()
    memory = sweeps.model_bytes(sweep, points)  # reads every point's recipe: mistakes come first
    sweeps.require_same_runs(sweep, points, folder)
    jobs = args.jobs or sweep_runs.jobs_at_once(memory, args.threads, gpus)
    now = points if sweep.seeds_of == "all" else [p for p in points if p.seed == 0]
    say(f"{len(now)} runs in {folder}, {min(jobs, len(now))} at a time")
    if args.dry_run:
        for point in now:
            say(f"  {point.name}  {' '.join(point.overrides)}")
        if len(now) < len(points):
            say(f"then the seeds 1 to {sweep.seeds - 1} of the best setting of each method")
        return
    command = sweep_runs.program(sweep.program)
    command += ["--recipe", sweep.recipe] + (["--config", sweep.config] if sweep.config else [])
    shared: dict[str, Any] = {"command": command, "folder": folder, "threads": args.threads}
    run: Any = partial(sweep_runs.run_sweep, jobs=jobs, gpus=gpus, **shared)
    if args.cluster:
        options = {key: _typed(value) for key, value in map(_pair, args.option)}
        run = partial(sweep_runs.submit_sweep, cluster=args.cluster, options=options, **shared)
    outcomes = run(now)
    if len(now) < len(points) and all(o.finished for o in outcomes.values()):
        from eval.analysis.load import load_run
        from eval.analysis.score import score

        scores = {p.name: score(load_run(folder / p.name)) for p in now}
        best = sweeps.of_the_best(points, scores)
        for point in best:
            if point.seed == 0:
                say(f"best of {point.method or 'the grid'}: {point.name}")
        outcomes |= run([p for p in best if p.seed])
    _report(folder, outcomes)


def _report(folder: Path, outcomes: dict[str, Any]) -> None:
    """The page of what has finished; raises UserError where a run has not."""
    from eval.report.compare import compare, terminal_summary, write_comparison
    from pipeline.errors import UserError
    from pipeline.progress import say

    failed = {name: o for name, o in outcomes.items() if not o.finished}
    finished = [folder / name for name in outcomes if name not in failed]
    if len(finished) > 1:
        page = write_comparison(finished, folder / "comparison")
        say(terminal_summary(compare(finished)))
        say(f"page: {page}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} runs failed; the same command tries them again:\n"
            + "\n".join(f"  {name}: see {o.log}" for name, o in failed.items())
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", default="demo", help="a recipe or a sweep: a file or a name (default: demo)")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="values of a recipe key; several --grid multiply",
    )
    add("--seeds", type=int, metavar="N", help="run every setting with the seeds 0 to N-1")
    add(
        "--seeds-of",
        choices=("all", "best"),
        help="best: the grid with seed 0, the other seeds of each method's best setting only",
    )
    add("--config", metavar="JSON", help="DeepSpeed configuration of every run")
    add(
        "--program",
        choices=("cpt", "instruct", "finetune"),
        help="what runs a point (default: cpt)",
    )
    add("--runs", default="runs", metavar="DIR", help="where sweeps go (default: runs)")
    add("--sweep", metavar="NAME", help="its folder (default: RECIPE_sweep)")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: what the machine takes)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of a run (default: 1)")
    add("--cluster", choices=("slurm", "local"), help="submit through submitit")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit's executor, e.g. slurm_partition=gpu timeout_min=120",
    )
    add("--dry-run", action="store_true", help="list the runs and stop")
    add("overrides", nargs="*", metavar="key=value", help="recipe settings of every run")
    return parser


def _sweep(args: argparse.Namespace) -> Any:
    from pipeline.errors import UserError
    from pipeline.run.sweep import Sweep, load_sweep

    sweep = load_sweep(args.recipe) or Sweep(args.recipe)
    for option in args.grid:
        key, values = _pair(option, "--grid")
        sweep.grid[key] = _values(values)
    if args.option and not args.cluster:
        raise UserError("--option has no effect without --cluster")
    for name in ("seeds", "seeds_of", "config", "program"):
        if getattr(args, name) is not None:
            setattr(sweep, name, getattr(args, name))
    return sweep


def _pair(text: str, option: str = "--option") -> tuple[str, str]:
    from pipeline.errors import UserError

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {text}: write KEY=VALUE")
    return key, value


def _typed(text: str) -> int | bool | str:
    """A number or a yes or no as such; all else, a time of 12:00:00 or 007, as it is written."""
    if re.fullmatch(r"0|[1-9][0-9]*", text):
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _values(text: str) -> list[Any]:
    """A comma-separated list; commas inside of brackets do not separate."""
    from omegaconf import OmegaConf

    return list(OmegaConf.from_dotlist([f"values=[{text}]"])["values"])


if __name__ == "__main__":
    run_command(main)
