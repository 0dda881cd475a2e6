"""Everything that is measured of one checkpoint: held-out loss, tasks, benchmarks, HumanEval, ...

`launch/evaluate.py` runs `measure_share` once per rank, each in a process of its own and on its
share of the work; `merge` puts the shares together. A part that fails leaves the others whole.
"""

import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from eval.measure import lm
from pipeline.data.heldout import load_heldout
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.model.gguf import local_weights
from pipeline.model.load import load_config, load_for_evaluation
from pipeline.model.task_adapters import FOLDER, TaskAdapters
from pipeline.recipe import Evaluation, Lora, Model
from pipeline.redact import redact
from pipeline.run.evaluation import RESULTS

SUFFIXES = {
    "heldout": "npz",
    "tasks": "jsonl",
    "benchmarks": "json",
    "humaneval": "jsonl",
    "end_tasks": "json",
}


@dataclass
class Checkpoint:
    """A model to measure, loaded when it is first needed."""

    path: str
    revision: str | None
    tokenizer_path: str | None  # default: the checkpoint's own
    objective: str
    precision: Literal["fp32", "bf16"]
    attention: str
    device: str
    lora: Lora | None = None  # of the recipe: how the base was quantized in training
    overrides: dict[str, Any] | None = None  # of the recipe's model

    @cached_property
    def model(self) -> Any:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return load_for_evaluation(
            self.path,
            self.objective,
            self.attention,
            self.revision,
            dtype,
            self.device,
            self.lora,
            self.overrides,
        )

    @cached_property
    def task_adapters(self) -> TaskAdapters | None:
        """Those that the checkpoint holds beside its own adapter; in the model, which answers with
        one of them from then on."""
        folder = Path(self.path)
        return TaskAdapters(folder, self.model) if (folder / FOLDER).is_dir() else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(local_weights(self.tokenizer_path or self.path), self.revision)


def check(settings: Evaluation, model: Model | None = None) -> None:
    """Whether this machine can do what the recipe asks for, before any training.

    model: what is to be trained.

    Raises:
        UserError: no sandbox for generated programs, an unknown benchmark, unusable local files or
            rows of an end task, a model that cannot be fine-tuned on one.
    """
    # Imported where they are used: lm-eval takes seconds, and a masked LM needs none of this.
    if settings.humaneval:
        from eval.measure import humaneval
        from eval.sandbox import sandbox

        humaneval.load_problems(settings.humaneval.limit)
        sandbox.probe(settings.humaneval.sandbox)
    if settings.benchmarks:
        from eval.measure import benchmark_sources

        benchmark_sources.check(settings.benchmarks, settings.benchmark_files)
    if settings.end_tasks:
        from eval.measure import classifier, end_tasks

        end_tasks.check(settings.end_tasks)
        if model is not None:
            path = model.path or "a model of model.config"
            classifier.check_family(path, load_config(model), settings.end_tasks)


def part(folder: Path, kind: str, rank: int) -> Path:
    """Where a share of a result lies until it is merged."""
    return folder / f"share-{rank}.{kind}.{SUFFIXES[kind]}"


def failure(folder: Path, kind: str, rank: int) -> Path:
    """Holds the reason where a share could not be measured."""
    return folder / f"share-{rank}.{kind}.failed"


def measure_share(
    checkpoint: Checkpoint,
    kinds: list[str],
    settings: Evaluation,
    heldout: Path | None,
    folder: Path,
    share: tuple[int, int],
    seed: int = 0,
    end_tasks_now: list[str] | None = None,
    asked: list[str] | None = None,
) -> list[str]:
    """Measure a share of each kind and write it into `folder`; the reasons of those that failed.

    end_tasks_now: of the settings' end tasks; asked: of the held-out folder's tasks; default: all.
    """
    disable_progress_bar()
    failed = []
    for kind in kinds:
        output, reason = part(folder, kind, share[0]), failure(folder, kind, share[0])
        output.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)
        try:
            if kind == "heldout":
                assert heldout is not None
                source = checkpoint.tokenizer_path or checkpoint.path
                lm.check_tokens(heldout, source, lambda: checkpoint.tokenizer)
                overlap = settings.overlap
                lm.evaluate_share(
                    checkpoint.model, heldout, output, share, settings.batch_size, overlap
                )
            elif kind == "benchmarks":
                from eval.measure import benchmarks

                benchmarks.evaluate_share(
                    checkpoint.model,
                    checkpoint.tokenizer,
                    settings.benchmarks,
                    settings.benchmark_files,
                    settings.unreachable,
                    output,
                    share,
                    settings.batch_size,
                )
            elif kind == "end_tasks":
                from eval.measure import end_tasks

                assert settings.end_tasks is not None
                copied = end_tasks.Source(
                    checkpoint.path,
                    checkpoint.revision,
                    checkpoint.tokenizer_path,
                    checkpoint.attention,
                    checkpoint.device,
                    checkpoint.overrides,
                )
                now = list(settings.end_tasks.tasks) if end_tasks_now is None else end_tasks_now
                end_tasks.evaluate_share(copied, settings.end_tasks, now, output, share)
            elif kind == "tasks":
                from eval.measure import tasks

                assert heldout is not None
                tasks.evaluate_share(
                    checkpoint.model,
                    checkpoint.tokenizer,
                    heldout,
                    settings.answers,
                    output,
                    share,
                    checkpoint.task_adapters,
                    asked,
                )
            else:
                from eval.measure import humaneval

                assert settings.humaneval is not None
                humaneval.evaluate_share(
                    checkpoint.model, checkpoint.tokenizer, settings.humaneval, seed, output, share
                )
        except UserError as error:
            failed.append(f"{kind}: {error}")
        except Exception as error:  # the other kinds go on
            print(redact(traceback.format_exc()), file=sys.stderr)
            failed.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            continue
        output.unlink(missing_ok=True)
        reason.write_text(failed[-1], encoding="utf-8")
    return failed


def merge(
    folder: Path,
    kinds: list[str],
    shares: int,
    settings: Evaluation,
    heldout: Path | None,
    threshold: float,
    info: dict[str, Any],
) -> list[str]:
    """Put the shares together to the files of `RESULTS`; the reasons of failures."""
    failed = []
    for kind in kinds:
        reasons = [f for r in range(shares) if (f := failure(folder, kind, r)).is_file()]
        parts = [part(folder, kind, r) for r in range(shares)]
        output = folder / RESULTS[kind]
        described = {**info, "precision": settings.precision}
        if reasons or not all(p.is_file() for p in parts):
            texts = [reason.read_text(encoding="utf-8") for reason in reasons]
            failed += list(dict.fromkeys(texts)) or [f"{kind}: a process ended without a result"]
            for file in [*reasons, *parts]:
                file.unlink(missing_ok=True)
        elif kind == "heldout":
            assert heldout is not None
            lm.merge_shares(parts, heldout, output, threshold, described)
        elif kind == "benchmarks":
            from eval.measure import benchmarks

            benchmarks.merge_shares(parts, output, described)
        elif kind == "end_tasks":
            from eval.measure import end_tasks

            end_tasks.merge_shares(parts, output, info)
        elif kind == "tasks":
            from eval.measure import tasks

            tasks.merge_shares(parts, output, described)
        else:
            from eval.measure import humaneval

            assert settings.humaneval is not None
            humaneval.merge_shares(parts, output, settings.humaneval, described)
    return failed


def objective_of(heldout: Path | None) -> str:
    """Of the checkpoint: what the held-out text was made for; tasks need a causal model."""
    return load_heldout(heldout)[0]["objective"] if heldout else "causal"
