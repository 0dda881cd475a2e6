"""The benchmarks of lm-eval on a published checkpoint: HellaSwag, ARC, WinoGrande and others.

Prompts, scoring and metrics are those of lm-eval's own tasks, which `benchmark_sources.py` writes.
This module shares the documents between processes and keeps the score of each, for paired
differences. The result does not depend on the number of processes: each of them builds all
requests, so that the few-shot examples are drawn alike, and batches are formed before they are
shared.
"""

import json
import logging
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval.measure.benchmark_sources import Source, write_tasks
from eval.measure.results import write_arrays, write_json
from pipeline.errors import UserError
from pipeline.hub_name import cache_only, unreachable
from pipeline.model.load import reads_ahead
from pipeline.network import offline
from pipeline.progress import say
from pipeline.recipe import Benchmark

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

FEWSHOT_SEED = 1234  # as in the `lm_eval` command


@torch.inference_mode()
def evaluate_share(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    benchmarks: dict[str, Benchmark],
    folder: str | None,
    unreachable: Literal["fail", "skip"],
    output: Path,
    share: tuple[int, int] = (0, 1),
    batch_size: int = 32,
    seed: int = FEWSHOT_SEED,
) -> None:
    """Evaluate every share[1]-th batch of documents, from share[0] on; write `output` (.json).

    The model (causal) stays on its device and is left in eval mode. `folder` holds the documents
    of a task in <task>/*.jsonl[.gz]. `batch_size` is in requests, one per choice of a document;
    `seed` draws the few-shot examples. Benchmarks whose dataset is neither in the local cache nor
    on a hub that answers are left out with `unreachable="skip"`.

    Raises:
        UserError: a model without a likelihood, a wrong setting or file, an unreachable dataset.
    """
    _check_causal(model)
    _silence()
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    work: list[tuple[str, ConfigurableTask, list[list[Instance]]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        sources = write_tasks(benchmarks, folder, Path(temporary))
        manager = TaskManager(include_path=temporary, include_defaults=False)
        with _offline_if_unreachable(not all(s.files for s in sources.values())):
            for name, benchmark in benchmarks.items():
                source = sources[name]
                task = _load_task(manager, name, source, unreachable)
                if task is None:
                    skipped[name] = f"{source} cannot be reached and is not in the local cache"
                    continue
                documents = _requests(task, source, benchmark, seed)
                blocks = _blocks(documents, batch_size)[share[0] :: share[1]]
                work += [(name, task, block) for block in blocks]
                results[name] = {
                    "task": source.task,
                    "metric": _choose_metric(task, source, benchmark),
                    "shots": benchmark.shots,
                    "limit": benchmark.limit,
                    "documents": len(documents),
                    "version": task.VERSION,
                    "source": str(source),
                    "truncated": 0,
                    "scores": {},
                }
    language_model = _language_model(model, tokenizer, batch_size)
    bar = tqdm(
        total=sum(len(document) for _, _, block in work for document in block),
        desc="benchmarks",
        unit="request",
        disable=None if share[0] == 0 else True,
        leave=False,
    )
    for name, task, block in work:
        before = language_model.truncated
        results[name]["scores"] |= _score(language_model, task, block)
        results[name]["truncated"] += language_model.truncated - before
        bar.update(sum(map(len, block)))
    bar.close()
    output.write_text(
        json.dumps({"benchmarks": results, "skipped": skipped}) + "\n", encoding="utf-8"
    )


def _check_causal(model: nn.Module) -> None:
    """Raises UserError for a model that gives text no likelihood: lm-eval would score it too."""
    config: Any = model.config
    if config.is_encoder_decoder:
        raise UserError(
            f"evaluate.benchmarks: {config.model_type} is an encoder-decoder; benchmarks are "
            "verified for causal models only. Remove them"
        )
    if reads_ahead(config):
        raise UserError(
            f"evaluate.benchmarks: {config.model_type} is a masked LM: it gives text no "
            "likelihood, and its scores would mean nothing. Remove them, or take a causal model"
        )


def _silence() -> None:
    """Leaves one progress bar, and no notes about every file that is read."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


@contextmanager
def _offline_if_unreachable(needed: bool) -> Iterator[None]:
    """Where the hub does not answer, only the local cache is asked; without this every dataset
    would cost half a minute of retries."""
    import datasets  # noqa: F401  # so that it is told too

    with cache_only() if needed and not offline() and unreachable() else nullcontext():
        yield


def _load_task(
    manager: "TaskManager", name: str, source: Source, unreachable: Literal["fail", "skip"]
) -> "ConfigurableTask | None":
    """The task with its documents; None where its dataset cannot be reached and may be skipped."""
    # As the command does: some tasks shuffle their choices.
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:  # of the hub client, of the JSON reader, of lm-eval's task
        if not source.files and isinstance(error, (ConnectionError, TimeoutError)):
            if unreachable == "skip":
                return None
            raise UserError(
                f"{source.key}: {source} cannot be reached and is not in the local cache. Give "
                "local files (`files`, or evaluate.benchmark_files), or set "
                "evaluate.unreachable=skip"
            ) from None
        cause = error.__cause__ or error
        problem = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
        if source.files:
            raise source.wrong_fields(problem) from None
        raise UserError(f"{source.key}: {source} cannot be used: {problem}") from None


def _choose_metric(task: "ConfigurableTask", source: Source, benchmark: Benchmark) -> str:
    """Raises UserError for a metric that is no mean over documents, or where lower is better."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    known = [k for k, f in task.aggregation().items() if f is mean and better.get(k, True)]
    chosen = benchmark.metric or ("acc_norm" if "acc_norm" in known else "acc")
    if chosen not in known:
        raise UserError(
            f"{source.key}.metric: {source.task} has no metric {chosen!r} that is a mean over "
            f"documents and grows as the model gets better; it has: {', '.join(known) or 'none'}"
        )
    return chosen


def _requests(
    task: "ConfigurableTask", source: Source, benchmark: Benchmark, seed: int
) -> "list[list[Instance]]":
    """The requests of each document: lm-eval's `build_all_requests` without its progress bar."""
    task.set_fewshot_seed(seed)
    shots = benchmark.shots
    if shots:
        pool = len(task.sampler.fewshot_docs())
        own = task.fewshot_cfg.split == task.config.test_split  # lm-eval may draw one, and drop it
        if pool < shots + own:
            raise UserError(
                f"{source.key}.shots: {shots} are too many: they are drawn from {pool} documents"
            )
    documents = []
    for doc_id, doc in task.doc_iterator(limit=benchmark.limit):
        if source.files:
            _check_label(task, source, doc_id, doc)
        built = task.construct_requests(
            doc=doc,
            ctx=task.fewshot_context(
                doc=doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc)
            ),
            metadata=(task.task_name, doc_id, 1),
        )
        documents.append(built if isinstance(built, list) else [built])
    return documents


def _check_label(task: "ConfigurableTask", source: Source, doc_id: int, doc: dict) -> None:
    """Raises UserError for an answer that is none of the choices: lm-eval counts it as wrong.

    So it does where a choice is a numeral, as in "how many": it takes the answer "4" for the number
    of a choice. The score stays lm-eval's; a line says so.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    known = range(len(choices)) if isinstance(gold, int) else choices
    if not isinstance(gold, list) and gold not in known:
        if str(gold) in choices:
            say(
                f"{source.key}: document {doc_id}: lm-eval takes its answer '{gold}' for the "
                "number of a choice and counts it as wrong"
            )
            return
        raise UserError(
            f"{source.key}: document {doc_id} of {source}: its answer {gold!r} is none of its "
            f"{len(choices)} choices (counted from 0)"
        )


def _blocks(documents: "list[list[Instance]]", batch_size: int) -> "list[list[list[Instance]]]":
    """Documents of similar length, about a batch of requests each, the longest first."""
    size = max(1, batch_size // max(len(document) for document in documents))
    ordered = sorted(
        documents, key=lambda d: max(sum(map(len, request.args)) for request in d), reverse=True
    )
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _score(
    language_model: Any, task: "ConfigurableTask", block: "list[list[Instance]]"
) -> dict[int, dict[str, float]]:
    """For each document, every metric that is a mean over documents."""
    from lm_eval.api.metrics import mean

    requests = [request for document in block for request in document]
    answers = language_model.loglikelihood(requests, disable_tqdm=True)
    for request, answer in zip(requests, answers, strict=True):
        request.resps.append(answer)
    task._instances = requests
    task.apply_filters()
    scores = {}
    for document in block:
        key = next(iter(document[0].filtered_resps))
        found = task.process_results(document[0].doc, [r.filtered_resps[key] for r in document])
        averaged = {k: v for k, v in found.items() if task.aggregation().get(k, mean) is mean}
        scores[document[0].doc_id] = {k: float(v) for k, v in averaged.items()}
    return scores


def _language_model(model: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's Hugging Face model, which also counts the requests that it truncates."""
    from lm_eval.models.huggingface import HFLM

    class CountingHFLM(HFLM):
        truncated = 0

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            limit = self.max_length + 1
            self.truncated += sum(len(c) + len(t) > limit for _, c, t in requests)
            return super()._loglikelihood_tokens(requests, **kwargs)

    return CountingHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def merge_shares(parts: list[Path], output: Path, info: dict[str, Any]) -> None:
    """Put the shares together and write `output` (benchmarks.json) atomically: {**info,
    benchmarks: {name: task, metric, value, stderr, metrics, shots, limit, documents, version,
    source, truncated}, skipped: {name: reason}, average, average_stderr, lm_eval}.

    `average` is the mean of the values, null where a benchmark was skipped; its standard error
    takes the tasks as independent. `truncated` counts requests whose context was cut from the
    left. Beside it `benchmarks.npz`: `<name>` float32 [documents], the metric of each document in
    their order. The parts are deleted.
    """
    shares = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
    skipped = {k: v for share in shares for k, v in share["skipped"].items()}
    benchmarks: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name, entry in shares[0]["benchmarks"].items():
        if name in skipped:
            continue
        entries = [share["benchmarks"][name] for share in shares]
        scores = {int(k): v for e in entries for k, v in e["scores"].items()}
        if len(scores) != entry["documents"]:
            raise RuntimeError(f"{name}: {len(scores)} of {entry['documents']} documents scored")
        ordered = [scores[doc_id] for doc_id in sorted(scores)]
        known = dict.fromkeys(k for s in ordered for k in s)
        metrics = {k: _mean([s[k] for s in ordered if k in s]) for k in known}
        arrays[name] = np.array([s.get(entry["metric"], np.nan) for s in ordered], np.float32)
        del entry["scores"]
        entry["truncated"] = sum(e["truncated"] for e in entries)
        benchmarks[name] = {**entry, **metrics[entry["metric"]], "metrics": metrics}
    average = average_stderr = None
    if benchmarks and not skipped:
        errors = [b["stderr"] for b in benchmarks.values()]
        average = sum(b["value"] for b in benchmarks.values()) / len(benchmarks)
        if None not in errors:
            average_stderr = math.hypot(*errors) / len(errors)
    result = {
        **info,
        "benchmarks": benchmarks,
        "skipped": skipped,
        "average": average,
        "average_stderr": average_stderr,
        "lm_eval": version("lm_eval"),
    }
    write_arrays(output.with_name("benchmarks.npz"), arrays)
    write_json(output, result)
    for part in parts:
        part.unlink()


def _mean(values: list[float]) -> dict[str, float | None]:
    """With lm-eval's own functions, so that the last digit is that of the command."""
    from lm_eval.api.metrics import mean, mean_stderr

    stderr = mean_stderr(values) if len(values) > 1 else None
    return {"value": mean(values), "stderr": stderr}
