"""The benchmarks of lm-eval on a published checkpoint: HellaSwag, ARC, WinoGrande and others.

Prompts, scoring and metrics are those of lm-eval's own tasks, whose installed YAML is included and
pointed at local files where these are given. This module shares the documents between processes
and keeps the score of each, for paired differences. The result does not depend on the number of
processes: each of them builds all requests, so that the few-shot examples are drawn alike, and
batches are formed before they are shared.
"""

import difflib
import glob
import gzip
import json
import logging
import math
import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval.results import write_arrays, write_json
from pipeline.errors import UserError
from pipeline.recipe import Benchmark

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

SCORED = ("multiple_choice", "loglikelihood")  # lm-eval's output types that need no generation
HUB_TIMEOUT = 5.0  # seconds until the hub counts as unreachable
FEWSHOT_SEED = 1234  # as in the `lm_eval` command

_QUERY = "{{query}}"
_QUESTION = "{{query.removesuffix('Answer:').removesuffix('\\n')}}\nAnswer:"
# The prompt of a task from its flat form, in which some files leave the "Answer:" out.
FLAT_PROMPTS = {
    "hellaswag": _QUERY,
    "openbookqa": _QUERY,
    "arc_challenge": _QUESTION,
    "arc_easy": _QUESTION,
    "piqa": _QUESTION,
}
FLAT_FIELDS = ("query", "choices", "gold")
# WinoGrande's options are spliced into the context; what is scored is the common continuation.
WINOGRANDE_FIELDS = ("context_options", "continuation", "gold")
WINOGRANDE_FLAT = {
    "doc_to_text": "{{gold}}",
    "doc_to_choice": "context_options",
    "doc_to_target": "continuation",
}


@dataclass
class Source:
    """A benchmark as a task of lm-eval, and where its documents are."""

    key: str  # in the recipe, for messages
    task: str  # lm-eval's name
    dataset: str  # the hub's
    settings: dict[str, Any]  # the YAML, which includes the installed one
    files: list[Path]  # none: the documents are the hub's
    flat: bool = False

    def __str__(self) -> str:
        if not self.files:
            return f"hub {self.dataset}"
        names = ", ".join(f"{p.parent.name}/{p.name}" for p in self.files)
        return f"files {names}{' (flat form)' if self.flat else ''}"

    def wrong_fields(self, problem: object) -> UserError:
        fields = ", ".join(_first_row(self.files[0], self.key)) or "none"
        return UserError(
            f"{self.key}: {self.files[0]} does not fit {self.task}: {problem}. Fields found: "
            f"{fields}. Expected are those of {self.dataset} on the hub, or a flat form: "
            f"{', '.join(FLAT_FIELDS)} ({', '.join(FLAT_PROMPTS)}); "
            f"{', '.join(WINOGRANDE_FIELDS)} (winogrande)"
        )


def check(benchmarks: dict[str, Benchmark], folder: str | None) -> None:
    """Whether the settings are right, as far as it can be told without the hub and a model.

    Raises:
        UserError: one message with every unknown or unsupported task and unusable file.
    """
    found = []
    for name, benchmark in benchmarks.items():
        try:
            find_source(name, benchmark, folder)
        except UserError as error:
            found.append(str(error))
    if found:
        raise UserError("\n".join(found))


def write_tasks(
    benchmarks: dict[str, Benchmark], folder: str | None, target: Path
) -> dict[str, Source]:
    """Write one YAML file per benchmark into `target`, for lm-eval's TaskManager or for
    `lm_eval --include_path target --tasks <names>`.

    Raises:
        UserError: unknown or unsupported task, no usable files.
    """
    import yaml

    sources = {n: find_source(n, benchmark, folder) for n, benchmark in benchmarks.items()}
    target.mkdir(parents=True, exist_ok=True)
    for i, source in enumerate(sources.values()):
        text = yaml.safe_dump(source.settings, sort_keys=False, allow_unicode=True)
        (target / f"{i}.yaml").write_text(text, encoding="utf-8")
    return sources


def find_source(name: str, benchmark: Benchmark, folder: str | None) -> Source:
    """The installed task, with `dataset_path` and `data_files` changed where there are files, and
    for the flat form what makes it read the fields.

    Raises:
        UserError: unknown or unsupported task, no usable files.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    task = benchmark.task or name
    key = f"evaluate.benchmarks.{name}"
    path = _installed_tasks().get(task)
    if path is None:
        raise UserError(f"{key}: lm-eval has no task {task!r}{_near_tasks(task)}")
    config = load_yaml(path, resolve_func=False)
    if config.get("output_type") not in SCORED or "class" in config:
        raise UserError(
            f"{key}: {task} is not scored by log-likelihood; only tasks of output_type "
            f"{' and '.join(SCORED)} are supported here"
        )
    if config.get("num_fewshot") == 0 and benchmark.shots:
        raise UserError(
            f"{key}.shots: {task} has its examples in the prompt (num_fewshot: 0 in lm-eval); "
            "set it to 0"
        )
    settings = {"include": str(path), "task": name, "num_fewshot": benchmark.shots}
    subset = f" ({config['dataset_name']})" if config.get("dataset_name") else ""
    dataset = f"{config.get('dataset_path')}{subset}"
    source = Source(key, task, dataset, settings, _files(key, task, benchmark, folder))
    if source.files:
        settings |= _flat_settings(source)
        settings |= _local_settings(source, config)
    return source


@cache
def _installed_tasks() -> dict[str, Path]:
    """The YAML of each of lm-eval's tasks. The same names as TaskManager's index, which takes 20
    times as long because it parses every file."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    name = re.compile(rb'^"?task"?: *["\']?([^\s"\'#]+)["\']? *(?:#.*)?\r?$', re.MULTILINE)
    found: dict[str, Path] = {}
    for path in sorted(Path(spec.submodule_search_locations[0], "tasks").rglob("*.yaml")):
        if match := name.search(path.read_bytes()):
            found.setdefault(match[1].decode(), path)
    return found


def _near_tasks(task: str) -> str:
    known = _installed_tasks()
    parts = [name for name in known if name.startswith(f"{task}_")]
    close = parts[:3] or difflib.get_close_matches(task, known, n=3)
    group = " (groups of tasks are not supported: name their tasks)" if parts else ""
    return f"{group}; did you mean {' or '.join(map(repr, close))}?" if close else group


def _files(key: str, task: str, benchmark: Benchmark, folder: str | None) -> list[Path]:
    """A benchmark's own files, else those in `folder`/<task>; none: its documents are the hub's."""
    paths = []
    for pattern in benchmark.files:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not found:
            raise UserError(f"{key}.files: no file matches {pattern} (from {Path.cwd()})")
        paths += found
    if not paths and folder and Path(folder, task).is_dir():
        paths = [p for p in sorted(glob.glob(f"{glob.escape(folder)}/{task}/*")) if _is_jsonl(p)]
        if not paths:
            raise UserError(f"evaluate.benchmark_files: no *.jsonl[.gz] in {folder}/{task}")
    for path in paths:
        if not _is_jsonl(path):
            raise UserError(f"{key}.files: {path} is neither .jsonl nor .jsonl.gz")
    return [Path(p).resolve() for p in paths]


def _is_jsonl(path: str) -> bool:
    return path.endswith((".jsonl", ".jsonl.gz"))


def _first_row(path: Path, key: str) -> dict[str, Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            row = json.loads(file.readline())
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{key}: {path} has no JSON object in its first line: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{key}: {path} has no JSON object in its first line")
    return row


def _flat_settings(source: Source) -> dict[str, Any]:
    """What makes a task read its flat form: the prompts stay those of the hub form."""
    fields = _first_row(source.files[0], source.key).keys()
    if not (fields >= set(FLAT_FIELDS) or fields >= set(WINOGRANDE_FIELDS)):
        return {}
    source.flat = True
    settings: dict[str, Any] = {"process_docs": None}
    if source.task == "winogrande" and fields >= set(WINOGRANDE_FIELDS):
        return settings | WINOGRANDE_FLAT
    if source.task in FLAT_PROMPTS and fields >= set(FLAT_FIELDS):
        return settings | {
            "doc_to_text": FLAT_PROMPTS[source.task],
            "doc_to_choice": "choices",
            "doc_to_target": "{{gold}}",
        }
    raise source.wrong_fields("it is in a flat form that is not known for this task")


def _local_settings(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Local files in place of the dataset. A file is the split that it is named after; where none
    is named after an evaluated split, all that are left are evaluated."""
    keys = ("training_split", "fewshot_split", "validation_split", "test_split")
    names = dict.fromkeys(config[k] for k in keys if config.get(k))
    splits = {n: [p for p in source.files if p.name.startswith(n)] for n in names}
    evaluated = config.get("test_split") or config["validation_split"]
    if not any(splits[config[k]] for k in ("validation_split", "test_split") if config.get(k)):
        named = {path for paths in splits.values() for path in paths}
        splits[evaluated] = [p for p in source.files if p not in named]
        if not splits[evaluated]:
            raise UserError(
                f"{source.key}: nothing to evaluate: {source.files[0]} is no {evaluated} split"
            )
    splits = {name: paths for name, paths in splits.items() if paths}
    source.files = [path for paths in splits.values() for path in paths]
    settings: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {k: [str(p) for p in v] for k, v in splits.items()}},
    }
    settings |= {k: None for k in keys if config.get(k) not in splits}
    if list(splits) == [config.get("test_split")]:
        # The examples are evaluated documents; said so, lm-eval leaves out the one that it asks.
        settings["fewshot_split"] = config["test_split"]
    return settings


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
    output.write_text(json.dumps({"benchmarks": results, "skipped": skipped}) + "\n")


def _check_causal(model: nn.Module) -> None:
    """Raises UserError for a model that gives text no likelihood: lm-eval would score it too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config: Any = model.config
    if config.is_encoder_decoder:
        raise UserError(
            f"evaluate.benchmarks: {config.model_type} is an encoder-decoder; benchmarks are "
            "verified for causal models only. Remove them"
        )
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not getattr(config, "is_decoder", False):
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
    import datasets
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if needed and not before[0]:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        except Exception:  # no name, no route, no answer, a proxy that refuses: of many kinds
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


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
    """Raises UserError for an answer that is none of the choices: lm-eval counts it as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    known = range(len(choices)) if isinstance(gold, int) else choices
    if not isinstance(gold, list) and gold not in known:
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
    shares = [json.loads(part.read_text()) for part in parts]
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
