"""Continual finetuning: one task after the other, as text to text, each measured after every stage.

deepspeed launch/finetune.py --config ds_configs/zero2.json
"""

import os
import sys

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.run.cli import importing, run_command, training_parser

EXAMPLES = """\
  deepspeed launch/finetune.py --config ds_configs/zero2.json
  deepspeed launch/finetune.py --config ds_configs/zero2.json --recipe t5_order1 --dry-run
  deepspeed launch/finetune.py --config ds_configs/zero2.json name=ft mask.enabled=false
  deepspeed launch/finetune.py --config ds_configs/zero2.json evaluate.answers.constrained=true
  torchrun --nproc_per_node 2 launch/finetune.py engine.kind=fsdp"""


def main() -> None:
    args = training_parser(__doc__, "toy_tasks", EXAMPLES).parse_intermixed_args()

    with importing():
        from eval.measured_run import measured_run

    measured_run(args)


if __name__ == "__main__":
    run_command(main)
