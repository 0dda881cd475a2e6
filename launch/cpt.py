"""Continual pretraining: one domain after the other, measured after every stage.

deepspeed launch/cpt.py --config ds_configs/zero2.json
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.cli import run_command, training_parser


def main() -> None:
    args = training_parser(__doc__, recipe="demo").parse_intermixed_args()

    from pathlib import Path

    import torch

    from eval.process import evaluate_in_processes
    from eval.report.page import write_report
    from eval.summary import print_summary
    from pipeline.dry_run import describe_run
    from pipeline.engine.config import resolve_engine_config
    from pipeline.engine.zero import start_distributed
    from pipeline.ranks import on_rank0, rank, world_size
    from pipeline.recipe import load_recipe
    from pipeline.run import run_recipe
    from pipeline.run_folder import restart

    recipe = load_recipe(args.recipe, args.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine_config = resolve_engine_config(args.config, recipe, world_size(), device)
    if args.dry_run:
        if rank() == 0:
            print(describe_run(recipe, engine_config, world_size()))
        return
    start_distributed()
    if args.restart:
        on_rank0(lambda: restart(Path(args.runs), recipe))
    page = run_recipe(recipe, engine_config, Path(args.runs), evaluate_in_processes, write_report)
    if rank() == 0:
        print_summary(page)


if __name__ == "__main__":
    run_command(main)
