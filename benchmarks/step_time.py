"""What a training step costs: fine-tuning, the mask in its modes, and the Hugging Face Trainer.

    python benchmarks/step_time.py --shape roberta-base --pairs 20 --json FILE

Every mode runs its own whole loop (`train_stage` here, `Trainer.train` there) in a thread of its
own, and the threads take turns step by step, so that a slow moment of the machine hits all alike.
Prints the median step of each mode and the median, over the rounds, of the ratio to fine-tuning
in the same round, with quartiles; the JSON has them too. Times are of whole steps: forward,
backward, mask, clipping, optimizer. Batches have no padding, as packed ones. On a CPU freed memory
is kept (`keep_freed_memory`), for all modes alike.

`--memory` runs every mode once more, alone in a process, and adds its peak, of the GPU, or resident
on a CPU, Python and libraries included, and of our modes what `--dry-run` estimates. Several ranks:
`torchrun --nproc-per-node 2 benchmarks/step_time.py ...`, each with the shape's batch. A GPU of 80
GB takes a 7B model whole where rows are chosen per stage, and 8 of its 32 blocks in every mode:

    python benchmarks/step_time.py --shape llama-7b --precision bf16 --checkpointing \\
        --modes rows_per_stage --memory
    python benchmarks/step_time.py --shape llama-7b --precision bf16 --layers 8 --sequences 4 \\
        --accumulation 2

Eight such GPUs take it whole, under torchrun: `--engine zero3 --modes ft exact row_sparse authors`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from authors_mask import AuthorsMask
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from turns import Turns, keep_freed_memory

from pipeline.engine.config import load_ds_config, resolve_ds_config, resolve_fsdp_config
from pipeline.engine.distributed import leave_group, start_distributed
from pipeline.engine.fsdp import FsdpEngine
from pipeline.engine.zero import ZeroEngine
from pipeline.migu.gradient_mask import GradientMask
from pipeline.migu.mask import kept_count
from pipeline.migu.targets import find_targets
from pipeline.model.compiled import compiled_blocks
from pipeline.model.split_linear import split_linears
from pipeline.ranks import rank, world_size
from pipeline.recipe import Data, Domain, Mask, Model, Recipe, Stage, Train
from pipeline.run.memory import estimate, split_as_in_training
from pipeline.run.speed import Speed, peak_memory, predictions
from pipeline.run.train import train_stage

ROBERTA = {"model_type": "roberta", "hidden_size": 768, "num_attention_heads": 12,
           "intermediate_size": 3072, "vocab_size": 50265, "type_vocab_size": 1}  # fmt: skip
LLAMA_7B = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
            "intermediate_size": 11008, "vocab_size": 32000}  # fmt: skip
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9,
           "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
           "tie_word_embeddings": True}  # fmt: skip
TINY = {**ROBERTA, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256,
        "vocab_size": 500}  # fmt: skip
# name: (configuration, layers, sequences, tokens)
SHAPES = {
    "tiny": (TINY, 2, 4, 32),
    "roberta-base": (ROBERTA, 12, 8, 128),
    "smollm2-135m": (SMOLLM2, 30, 2, 512),
    "llama-7b": (LLAMA_7B, 32, 1, 2048),
}
MODES = ("trainer", "ft", "exact", "row_sparse", "rows_per_stage", "authors", "compiled",
         "compiled_ft")  # fmt: skip
RATIOS = {  # name in the result: (of, to)
    "ft_vs_trainer": ("ft", "trainer"),
    "exact_vs_ft": ("exact", "ft"),
    "row_sparse_vs_ft": ("row_sparse", "ft"),
    "rows_per_stage_vs_ft": ("rows_per_stage", "ft"),
    "authors_vs_ft": ("authors", "ft"),
    "compiled_vs_exact": ("compiled", "exact"),
    "compiled_ft_vs_ft": ("compiled_ft", "ft"),
    "compiled_vs_compiled_ft": ("compiled", "compiled_ft"),
}
LR = 1e-5


def engine_of(args: argparse.Namespace, device: str, split: bool = False) -> Any:
    """Of the shape, with rows as `mask.refresh: stage` splits them, or without."""
    recipe = _recipe(args)
    model = _model(args, device)
    if split:
        kept = {}
        for target in find_targets(model):
            count = kept_count(target.rows, args.threshold)
            kept[target.name] = torch.randperm(target.rows) < count
        split_linears(model, kept)
    engine = FsdpEngine if args.engine == "fsdp" else ZeroEngine
    return engine(model, _engine_config(args, recipe, device), recipe.optimizer)


class Ours(Turns):
    """The loop of a stage. Several of them may share an engine."""

    def __init__(
        self, mode: str, args: argparse.Namespace, steps: list[list[dict]], device: str, engine: Any
    ):
        super().__init__(device)
        self._steps = steps
        self._recipe = _recipe(args)
        self._recipe.mask = Mask(
            threshold=args.threshold, backward="row_sparse" if mode == "row_sparse" else "dense"
        )
        self.engine = engine
        self._mask: Any = None
        self._compiled = mode.startswith("compiled")
        if mode in ("exact", "row_sparse", "compiled"):
            self._mask = GradientMask(engine.module, self._recipe.mask, seed=0)
        elif mode == "authors":
            self._mask = AuthorsMask(engine.module, args.threshold)
        if mode == "row_sparse":
            self._mask.sparse.close()

    def loop(self) -> None:
        sparse = getattr(self._mask, "sparse", None)

        def batches() -> Iterator[list[dict]]:
            for step in self._steps:
                self.begin()
                if sparse:
                    sparse.open()
                yield step

        def after_step(*_: Any) -> None:
            if sparse:
                sparse.close()
            self.end()

        n = len(self._steps)
        with compiled_blocks(self.engine.module) if self._compiled else nullcontext():
            train_stage(
                self.engine, self._mask, batches(), self._recipe, 1, n, None,
                after_step=after_step,
            )  # fmt: skip


class Trainers(Turns):
    """The Hugging Face Trainer under DeepSpeed, on the same batches."""

    def __init__(self, args: argparse.Namespace, steps: list[list[dict]], device: str):
        from transformers import Trainer, TrainerCallback, TrainingArguments

        super().__init__(device)
        turns = self

        class Steps(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turns.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.end()

        model = _model(args, device)
        rows = [
            {k: t[i] for k, t in batch.items()}
            for step in steps
            for batch in step
            for i in range(len(batch["input_ids"]))
        ]
        self._folder = tempfile.TemporaryDirectory()
        recipe = _recipe(args)
        zero = None
        if args.trainer == "deepspeed":
            zero = {
                **_zero(args),
                "zero_allow_untested_optimizer": True,
            }
            if device == "cpu":
                zero["zero_force_ds_cpu_optimizer"] = False
        settings: Any = TrainingArguments(
            output_dir=self._folder.name, max_steps=len(steps), learning_rate=LR,
            per_device_train_batch_size=recipe.train.micro_batch_size or 1,
            gradient_accumulation_steps=args.accumulation, lr_scheduler_type="constant",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=device == "cpu", bf16=args.precision == "bf16", dataloader_num_workers=0,
            train_sampling_strategy="sequential", remove_unused_columns=False, deepspeed=zero,
            gradient_checkpointing=args.checkpointing, dataloader_pin_memory=False,
        )  # fmt: skip
        self._trainer = Trainer(model, settings, train_dataset=rows, callbacks=[Steps()])  # type: ignore[arg-type]

    def loop(self) -> None:
        self._trainer.train()


def _zero(args: argparse.Namespace) -> dict[str, Any]:
    """The project's own configuration of the stage; of one rank, the one that is meant for it."""
    return load_ds_config(
        "zero2_one_gpu" if args.engine == "zero2" and world_size() == 1 else args.engine
    )


def _engine_config(args: argparse.Namespace, recipe: Recipe, device: str) -> dict[str, Any]:
    if args.engine == "fsdp":
        return resolve_fsdp_config(recipe, world_size(), device)
    return resolve_ds_config(_zero(args), recipe, world_size(), device)


def _recipe(args: argparse.Namespace) -> Recipe:
    config, _, _, length = SHAPES[args.shape]
    sequences = _sequences(args)
    recipe = Recipe(
        name="benchmark",
        model=Model(
            config=config,
            objective="causal" if config["model_type"] == "llama" else "masked",
            gradient_checkpointing=args.checkpointing,
        ),
        data=Data(domains={"x": Domain(embedded="prose")}, sequence_length=length),
        stages=[Stage("x", steps=1)],
        train=Train(
            batch_size=sequences * args.accumulation * world_size(),
            micro_batch_size=sequences,
            precision=args.precision,
            chunked_loss=args.chunked_loss,
        ),
    )
    recipe.optimizer.lr = LR
    recipe.optimizer.schedule = "constant"
    return recipe


def _sequences(args: argparse.Namespace) -> int:
    """Of a micro-batch."""
    return args.sequences or SHAPES[args.shape][2]


def _tokens(args: argparse.Namespace) -> int:
    """Of a rank's step."""
    return _sequences(args) * SHAPES[args.shape][3] * args.accumulation


def _model(args: argparse.Namespace, device: str) -> nn.Module:
    """Made where it is trained: billions of random numbers take a CPU minutes."""
    values, layers, _, length = SHAPES[args.shape]
    values = {**values, "num_hidden_layers": args.layers or layers}
    values["max_position_embeddings"] = length + 2
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if values["model_type"] == "llama" else AutoModelForMaskedLM
    kind = values.pop("model_type")
    with torch.device(device):
        model = auto.from_config(AutoConfig.for_model(kind, **values))
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def steps_of(args: argparse.Namespace, count: int) -> list[list[dict]]:
    """Random tokens; a masked model predicts 15% of them, a causal one all."""
    config, _, _, length = SHAPES[args.shape]
    sequences = _sequences(args)
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(count):
        step = []
        for _ in range(args.accumulation):
            ids = torch.randint(5, config["vocab_size"], (sequences, length), generator=generator)
            labels = ids.clone()
            if config["model_type"] != "llama":
                labels[torch.rand(ids.shape, generator=generator) >= 0.15] = -100
            step.append({"input_ids": ids, "labels": labels})
        steps.append(step)
    return steps


def measure(args: argparse.Namespace) -> dict[str, Any]:
    keep_freed_memory(args.keep_large)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start_distributed()
    warm = 2
    steps = steps_of(args, args.pairs + warm + args.profile)
    modes: dict[str, Turns] = {}
    shared = None
    for mode in args.modes:
        if mode == "trainer":
            modes[mode] = Trainers(args, steps, device)
            continue
        if mode == "rows_per_stage" or mode.startswith("compiled"):
            engine = engine_of(args, device, split=mode == "rows_per_stage")
        else:
            engine = shared = shared or engine_of(args, device)
        modes[mode] = Ours(mode, args, steps, device, engine)
    for i in range(args.pairs + warm):  # every second round the other way round
        for mode in args.modes if i % 2 == 0 else reversed(args.modes):
            modes[mode].step()
    if args.profile:
        for mode, turns in modes.items():
            print(f"{mode}:\n{profile(turns)}")
    seconds = {mode: turns.seconds[warm : warm + args.pairs] for mode, turns in modes.items()}
    result: dict[str, Any] = {
        "shape": args.shape, "layers": args.layers or SHAPES[args.shape][1],
        "tokens": _tokens(args),
        "threshold": args.threshold, "precision": args.precision, "engine": args.engine,
        "accumulation": args.accumulation, "checkpointing": args.checkpointing,
        "chunked_loss": args.chunked_loss, "keep_large": args.keep_large,
        "trainer": args.trainer, "ranks": world_size(),
        "rounds": args.pairs, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "seconds": {mode: statistics.median(s) for mode, s in seconds.items()},
    }  # fmt: skip
    for name, (of, to) in RATIOS.items():
        if of in seconds and to in seconds:
            ratios = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            result[name] = round(middle, 4)
            result[f"{name}_spread"] = [round(low, 4), round(high, 4)]
    if len(modes) == 1:  # before `_mfu`, which counts peaks anew
        result["peak_memory_gb"] = {mode: peak_memory(torch.device(device)) / 1e9 for mode in modes}
    if device == "cuda":
        result["mfu"] = {
            mode: round(_mfu(args, turns.engine, result["seconds"][mode]), 4)
            for mode, turns in modes.items()
            if isinstance(turns, Ours)
        }
    return result


def profile(turns: Turns) -> str:
    """The kernels of a GPU that take the most of one more step: ms, calls, name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        turns.step()
    kernels = sorted(profiler.key_averages(), key=lambda k: -k.self_device_time_total)
    return "\n".join(
        f"{k.self_device_time_total / 1000:10.2f} ms {k.count:6}  {k.key[:120]}"
        for k in kernels[:40]
    )


def _mfu(args: argparse.Namespace, engine: Any, seconds: float) -> float:
    """Of the dense step (docs/performance.md); NaN on a GPU whose peak is not known."""
    recipe, tokens = _recipe(args), _tokens(args) * world_size()
    speed = Speed(engine.module, recipe, engine.device)
    numbers = speed.numbers(tokens, predictions(recipe, tokens), seconds)
    return numbers.get("mfu", float("nan"))


def estimated_memory(args: argparse.Namespace, mode: str) -> float:
    """GB on the device, as `--dry-run` says it of a run whose mask is this mode's."""
    recipe = _recipe(args)
    recipe.mask = Mask(
        enabled=mode != "ft",
        threshold=args.threshold,
        backward="row_sparse" if mode == "row_sparse" else "dense",
    )
    plain = argparse.Namespace(**{**vars(args), "checkpointing": False})  # the recipe says it
    model = _model(plain, "meta")
    if mode == "rows_per_stage":
        recipe.mask.refresh = "stage"
        split_as_in_training(model, recipe)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = estimate(model, recipe, _engine_config(args, recipe, device), world_size()).values()
    return sum(size[0] if device == "cuda" else size[0] + size[1] for size in sizes) / 1e9


def memory_of(mode: str) -> dict[str, float]:
    """Peak GB of a mode that runs alone, with the arguments of this command."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        own = [*sys.argv, "--modes", mode, "--pairs", "2", "--json", str(file)]
        own.remove("--memory")
        alone = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        }
        subprocess.run([sys.executable, *own], check=True, env=alone, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text(encoding="utf-8"))["peak_memory_gb"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="roberta-base", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--sequences", type=int, help="of a micro-batch, others than the shape's")
    parser.add_argument("--modes", nargs="+", default=list(MODES[:-2]), choices=MODES)
    parser.add_argument("--pairs", type=int, default=20, help="timed rounds of one step each")
    parser.add_argument("--threshold", type=float, default=0.7)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--chunked-loss", action="store_true", help="but for the Trainer")
    parser.add_argument(
        "--keep-large", action="store_true", help="CPU: keep freed blocks over 64 MB too"
    )
    parser.add_argument("--memory", action="store_true", help="also the peak of every mode")
    parser.add_argument(
        "--profile", action="store_true", help="GPU: also the kernels of one more step of each mode"
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--engine", default="zero2", choices=["zero0", "zero1", "zero2", "zero3", "fsdp"]
    )
    parser.add_argument("--trainer", default="deepspeed", choices=["deepspeed", "plain"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error("--pairs: at least 2")
    if args.engine == "fsdp" and args.trainer == "deepspeed" and "trainer" in args.modes:
        parser.error("--engine fsdp: set --trainer plain, or leave the trainer out of --modes")
    if args.profile and not torch.cuda.is_available():
        parser.error("--profile: without a GPU there are no kernels to tell apart")
    if args.memory and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("--memory: of one rank; on several, the log of a run has its peak")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    peaks: dict[str, float] = {}
    if args.memory and len(args.modes) > 1:  # before this process takes any of it
        peaks = {k: v for mode in args.modes for k, v in memory_of(mode).items()}
    result = measure(args)
    first = rank() == 0
    leave_group()
    if not first:
        return
    if args.memory:
        result["peak_memory_gb"] = peaks or result["peak_memory_gb"]
        result["estimated_memory_gb"] = {
            mode: estimated_memory(args, mode)
            for mode in args.modes
            if mode in ("ft", "exact", "row_sparse", "rows_per_stage")
        }
    print(f"{result['shape']}, {result['tokens']:,} tokens a step, {result['device']}, "
          f"{result['threads']} threads, torch {result['torch']}")  # fmt: skip
    for mode, seconds in result["seconds"].items():
        print(f"  {mode:<16}{seconds * 1000:10.1f} ms")
    for mode, peak in result.get("peak_memory_gb", {}).items():
        estimated = result["estimated_memory_gb"].get(mode) if args.memory else None
        said = f", estimated {estimated:.2f}" if estimated else ""
        print(f"  {mode:<16}{peak:10.2f} GB at its peak{said}")
    for mode, share in result.get("mfu", {}).items():
        print(f"  {mode:<16}{share:10.1%} MFU")
    for name in RATIOS:
        if name in result:
            low, high = result[f"{name}_spread"]
            print(f"  {name:<22}{result[name]:6.3f}  ({low:.3f} to {high:.3f})")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
