"""Instruction tuning of a causal model: what it learns (HumanEval) and what it forgets (HellaSwag,
WinoGrande, ARC-Challenge, held-out text), measured after every stage.

deepspeed launch/instruct.py --config ds_configs/zero2.json
"""

import os
import sys

# The project's folder instead of this one, whose files would hide libraries of the same names.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(p for p in sys.path if os.path.realpath(p) != HERE)]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.run.cli import importing, run_command, training_parser

EXAMPLES = """\
  deepspeed launch/instruct.py --config ds_configs/zero2.json
  deepspeed launch/instruct.py --config ds_configs/zero3.json --recipe llama2_magicoder_full
  deepspeed launch/instruct.py --config ds_configs/zero2.json name=lora model.lora={}
  deepspeed launch/instruct.py --config ds_configs/zero2.json \\
      'data.domains.code={files: [mine.jsonl], instruction: {prompt: question, response: answer}}'
  torchrun --nproc_per_node 2 launch/instruct.py engine.kind=fsdp"""


def main() -> None:
    args = training_parser(__doc__, "smollm2_code", EXAMPLES).parse_intermixed_args()

    with importing():
        from eval.measured_run import measured_run

    measured_run(args)


if __name__ == "__main__":
    run_command(main)
