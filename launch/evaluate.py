"""Measure any checkpoint: held-out loss, lm-eval's benchmarks, HumanEval, end tasks.

  python launch/evaluate.py --checkpoint runs/code/stages/01_code/checkpoint \\
      --tasks hellaswag arc_challenge winogrande humaneval --limit 100
  python launch/evaluate.py --checkpoint runs/demo/stages/01_math/checkpoint \\
      --tasks heldout --heldout runs/demo/heldout
  python launch/evaluate.py --checkpoint runs/das/stages/06_camera/checkpoint \\
      --end-tasks restaurant acl_arc --end-task-files data/end_tasks --output results
"""

import os
import sys

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import signal
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.run.cli import importing, run_command


def main() -> None:
    args = _parser().parse_args()
    if args.share or args.with_parent:  # else nobody waits for the result
        from eval.sandbox.jail import die_with_parent

        die_with_parent(os.getppid())  # before the slow imports, during which the run may end
    if args.line is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends, and says so
        os.set_inheritable(args.line, False)  # it is of no one else, generated programs above all
    with importing():
        import eval.measure.checkpoint  # noqa: F401  # what `measure` needs
    measure(args)
    if args.line is not None:
        _measure_more(args.line)


def measure(args: argparse.Namespace) -> None:
    """What the arguments ask for."""
    import tempfile

    import torch

    from eval.measure.checkpoint import Checkpoint, check, measure_share, merge, objective_of
    from pipeline.data.heldout import load_tasks
    from pipeline.engine.config import slow_bf16
    from pipeline.errors import UserError
    from pipeline.recipe import Mask
    from pipeline.run.recipe_file import load_recipe

    recipe = load_recipe(args.recipe) if args.recipe else None
    settings, kinds = _settings(args, recipe)
    if "heldout" in kinds and args.heldout is None:
        raise UserError("--heldout is missing: the `heldout` folder of a run; or other --tasks")
    if "heldout" in kinds and not (args.heldout / "manifest.json").is_file():
        raise UserError(
            f"--heldout {args.heldout}: not a held-out folder (no manifest.json); give the "
            "`heldout` folder of a run"
        )
    objective = objective_of(args.heldout)
    if objective != "causal" and {"benchmarks", "humaneval"} & set(kinds):
        raise UserError(
            "--tasks: benchmarks and HumanEval need a causal model: a masked LM such as RoBERTa "
            "gives text no likelihood, and its scores would mean nothing"
        )
    known = list(load_tasks(args.heldout)) if "tasks" in kinds and args.heldout else []
    if "tasks" in kinds and not known:
        raise UserError("--tasks tasks: give --heldout of a run that has tasks")
    asked = known if args.answer is None else args.answer
    if missing := [n for n in asked if n not in known]:
        raise UserError(f"--answer {' '.join(missing)}: the tasks are {', '.join(known)}")
    checkpoint = Checkpoint(
        args.checkpoint,
        args.revision,
        args.tokenizer,
        objective,
        args.precision or settings.precision,
        args.attention,
        args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        recipe.model.lora if recipe else None,
        recipe.model.overrides if recipe else None,
    )
    # What a run's recipe asks for, the run has said.
    if args.precision == "bf16" and not args.share and (slow := slow_bf16(checkpoint.device)):
        print(f"{slow}; --precision fp32 is faster")
    measured = partial(
        measure_share,
        checkpoint,
        kinds,
        settings,
        args.heldout,
        seed=recipe.seed if recipe else 0,
        end_tasks_now=args.end_tasks,
        asked=asked,
    )
    if args.share:
        place, _, shares = args.share.partition("/")
        failed = measured(args.output, (int(place), int(shares)))
    else:
        check(settings)
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.output or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            info = {"checkpoint": args.checkpoint}
            measured(folder, (0, 1))
            threshold = Mask.threshold if args.threshold is None else args.threshold
            failed = merge(folder, kinds, 1, settings, args.heldout, threshold, info)
            there = [k for k in kinds if not any(f.startswith(k) for f in failed)]
            if there:
                _print(folder, there)
    if failed:
        raise UserError("could not be measured:\n  " + "\n  ".join(failed))


def _measure_more(descriptor: int) -> None:
    """What the other end of a line asks for, until it is gone (`eval/measure/evaluator.py`)."""
    import gc
    from multiprocessing.connection import Connection

    line = Connection(descriptor)
    while True:
        gc.collect()  # the model, while nothing is asked
        line.send(None)  # that it is done
        try:
            arguments = line.recv()
        except EOFError:
            return
        measure(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder, hub id or .gguf file of the model")
    add("--revision", help="of a hub model")
    add("--tokenizer", help="folder or hub id (default: the checkpoint's own)")
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="heldout, tasks (those of the held-out folder), humaneval, end_tasks, benchmarks "
        "(those of the recipe), or names of the recipe's benchmarks or of lm-eval's log-likelihood "
        "tasks (default: what the recipe measures; without a recipe, heldout)",
    )
    add(
        "--recipe",
        metavar="YAML",
        help="take `evaluate` from it, and how an adapter's base is quantized, e.g. "
        "runs/NAME/recipe.yaml",
    )
    add("--heldout", type=Path, metavar="DIR", help="a run's heldout folder: text and masks")
    add("--limit", type=int, metavar="N", help="the first N documents and problems only")
    add("--shots", type=int, metavar="N", help="examples before each question (default: 0)")
    add(
        "--benchmark-files",
        metavar="DIR",
        help="folder with <task>/*.jsonl[.gz] to read instead of the hub (docs/benchmarks.md)",
    )
    add(
        "--end-tasks",
        nargs="+",
        metavar="NAME",
        help="fine-tune on these alone: of the recipe, or restaurant, phone, camera, acl_arc, "
        "scierc, chemprot",
    )
    add("--answer", nargs="*", metavar="NAME", help="of the held-out folder's tasks, these alone")
    add("--end-task-files", metavar="DIR", help="folder with <name>/{train,dev,test}.jsonl[.gz]")
    add("--seeds", type=int, nargs="+", metavar="N", help="of the end tasks (default: five)")
    add("--samples", type=int, metavar="N", help="HumanEval completions beside the greedy one")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="of an answer (default: 50) or a HumanEval completion (512)",
    )
    add("--sandbox", choices=("auto", "bubblewrap", "landlock", "unsafe"), help="for HumanEval")
    add("--batch-size", type=int, help="sequences (default: 32, HumanEval: 16)")
    add("--precision", choices=("fp32", "bf16"), help="of the weights (default: fp32)")
    add("--attention", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"))
    add("--device", help="default: cuda where there is one, else cpu")
    add(
        "--no-overlap",
        action="store_true",
        default=None,
        help="do not compare kept rows of the domains",
    )
    add("--threshold", type=float, help="of the kept rows compared (default: 0.7)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="write eval.json, tasks.json, benchmarks.json, humaneval.json, end_tasks.json and "
        "their files here; end tasks that lie there are not done again (default: print the "
        "numbers only)",
    )
    add("--with-parent", action="store_true", help=argparse.SUPPRESS)  # end when it ends
    add("--share", metavar="R/N", help=argparse.SUPPRESS)  # a rank's part, written to --output
    add("--line", type=int, help=argparse.SUPPRESS)  # a descriptor: there is more to measure
    return parser


def _settings(args: argparse.Namespace, recipe: Any) -> tuple[Any, list[str]]:
    """The recipe's `evaluate` with the command line over it, and the kinds of measurement."""
    from dataclasses import replace

    from pipeline.errors import UserError
    from pipeline.recipe import Benchmark, Evaluation, HumanEval
    from pipeline.run.problems import evaluation_problems

    settings = recipe.evaluate if recipe else Evaluation()
    tasks = args.tasks
    if tasks is None:
        tasks = ["heldout"] if args.heldout or not recipe else []
        tasks += ["benchmarks"] * bool(settings.benchmarks)
        tasks += ["humaneval"] * bool(settings.humaneval)
        tasks += ["end_tasks"] * bool(settings.end_tasks)
        tasks += ["tasks"] * bool(recipe and recipe.tasks())
    if args.end_tasks and "end_tasks" not in tasks:
        tasks = ["end_tasks"] if args.tasks is None and not recipe else [*tasks, "end_tasks"]
    known = settings.benchmarks
    named = [t for t in tasks if t not in KINDS]
    if "benchmarks" in tasks:
        if not known:
            raise UserError("--tasks benchmarks: no recipe lists any; name them, e.g. hellaswag")
        named = list(dict.fromkeys([*known, *named]))
    benchmarks = {name: known.get(name) or Benchmark(task=name) for name in named}
    limit = {} if args.limit is None else {"limit": args.limit}
    shots = {} if args.shots is None else {"shots": args.shots}
    benchmarks = {name: replace(b, **limit, **shots) for name, b in benchmarks.items()}
    humaneval = None
    if "humaneval" in tasks:
        given = {
            "samples": args.samples,
            "max_new_tokens": args.max_new_tokens,
            "sandbox": args.sandbox,
            "batch_size": args.batch_size,
        }
        given = {k: v for k, v in given.items() if v is not None}
        humaneval = replace(settings.humaneval or HumanEval(), **given, **limit)
    answers = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, **limit}
    answers = {k: v for k, v in answers.items() if v is not None}
    settings = replace(
        settings,
        benchmarks=benchmarks,
        humaneval=humaneval,
        end_tasks=_end_tasks(args, settings.end_tasks) if "end_tasks" in tasks else None,
        batch_size=settings.batch_size if args.batch_size is None else args.batch_size,
        benchmark_files=args.benchmark_files or settings.benchmark_files,
        answers=replace(settings.answers, **answers) if "tasks" in tasks else settings.answers,
        overlap=settings.overlap and not args.no_overlap,
        precision=args.precision or settings.precision,
    )
    kinds = ["heldout"] * ("heldout" in tasks) + ["benchmarks"] * bool(benchmarks)
    kinds += ["humaneval"] * bool(humaneval) + ["end_tasks"] * bool(settings.end_tasks)
    kinds += ["tasks"] * ("tasks" in tasks)
    problems = evaluation_problems(settings) + _without_effect(args, kinds)
    if args.threshold is not None and not 0 <= args.threshold < 1:
        problems += [f"--threshold {args.threshold}: must be at least 0 and below 1"]
    if problems:
        raise UserError("\n".join(problems))
    return settings, kinds


def _end_tasks(args: argparse.Namespace, known: Any) -> Any:
    """The recipe's end tasks, or those that the command line names."""
    from dataclasses import replace

    from pipeline.errors import UserError
    from pipeline.recipe import EndTask, EndTasks

    settings = known or EndTasks(tasks={n: EndTask() for n in args.end_tasks or []})
    if missing := [n for n in args.end_tasks or [] if n not in settings.tasks]:
        raise UserError(
            f"--end-tasks {' '.join(missing)}: not in evaluate.end_tasks.tasks of the recipe, "
            f"which has {', '.join(settings.tasks)}"
        )
    given = {"files": args.end_task_files, "seeds": args.seeds}
    return replace(settings, **{k: v for k, v in given.items() if v is not None})


KINDS = ("heldout", "humaneval", "benchmarks", "end_tasks", "tasks")
# What only some measurements read.
READ_BY = {
    "limit": ("benchmarks", "humaneval", "tasks"),
    "shots": ("benchmarks",),
    "benchmark_files": ("benchmarks",),
    "samples": ("humaneval",),
    "max_new_tokens": ("humaneval", "tasks"),
    "sandbox": ("humaneval",),
    "answer": ("tasks",),
    "no_overlap": ("heldout",),
    "threshold": ("heldout",),
    "end_tasks": ("end_tasks",),
    "end_task_files": ("end_tasks",),
    "seeds": ("end_tasks",),
}


def _without_effect(args: argparse.Namespace, kinds: list[str]) -> list[str]:
    return [
        f"--{option.replace('_', '-')} has no effect: --tasks has no {' or '.join(readers)}"
        for option, readers in READ_BY.items()
        if getattr(args, option) is not None and not set(readers) & set(kinds)
    ]


def _print(folder: Path, kinds: list[str]) -> None:
    import json

    from pipeline.run.evaluation import RESULTS

    results = {k: json.loads((folder / RESULTS[k]).read_text(encoding="utf-8")) for k in kinds}
    print(json.dumps(results["heldout"] if kinds == ["heldout"] else results, indent=2))


if __name__ == "__main__":
    run_command(main)
