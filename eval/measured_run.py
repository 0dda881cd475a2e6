"""What the training commands share: check, train stage by stage, measure, report."""

import argparse
from pathlib import Path

import torch

from eval.measure.checkpoint import check
from eval.measure.lm import losses_in_engine, measure_in_engine
from eval.measure.process import evaluate_in_processes
from eval.report.page import write_report
from eval.report.summary import print_summary
from pipeline import signals
from pipeline.engine.config import resolve_engine_config
from pipeline.engine.distributed import start_distributed
from pipeline.ranks import on_rank0, rank, world_size
from pipeline.run.dry_run import describe_run
from pipeline.run.folder import restart
from pipeline.run.measure import measure_steps
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from pipeline.run.trackers import check_trackers

STARTING = 5.0  # seconds from a signal to the end, as long as there is nothing to lose


def measured_run(args: argparse.Namespace) -> None:
    """Run the recipe that the command line names; every rank calls this.

    Raises:
        UserError: whatever in the recipe, the configuration or the machine does not fit.
        TrainingStopped: the loss is no number any more.
        Interrupted: a signal.
    """
    recipe = load_recipe(args.recipe, args.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine_config = resolve_engine_config(args.config, recipe, world_size(), device)
    if args.dry_run or args.measure:
        if rank() == 0:
            check(recipe.evaluate, recipe.model)
            check_trackers(recipe.track)
            print(describe_run(recipe, engine_config, world_size()))
        if args.measure:
            start_distributed()
            lines = measure_steps(recipe, engine_config)
            if rank() == 0:
                print("\n".join(lines))
        return
    with signals.listening(grace=STARTING):
        start_distributed()
        on_rank0(lambda: check(recipe.evaluate, recipe.model))
        on_rank0(lambda: check_trackers(recipe.track))
        if args.restart:
            on_rank0(lambda: restart(Path(args.runs), recipe))
    page = run_recipe(
        recipe,
        engine_config,
        Path(args.runs),
        measure_in_engine,
        evaluate_in_processes,
        write_report,
        losses_in_engine,
    )
    if rank() == 0:
        print_summary(page)
