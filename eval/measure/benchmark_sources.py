"""Where the documents of lm-eval's benchmarks are: on the hub, or in local files of either form.

The installed YAML of a task is included and pointed at the local files where these are given.
"""

import difflib
import glob
import gzip
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.recipe import Benchmark

SCORED = ("multiple_choice", "loglikelihood")  # lm-eval's output types that need no generation
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


def task_version(task: str) -> Any:
    """Of a task as lm-eval has it now, as results name it; None where it has none."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _installed_tasks().get(task)
    if path is None:
        return None
    return (load_yaml(path, resolve_func=False).get("metadata") or {}).get("version")


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
