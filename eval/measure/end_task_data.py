"""The rows of an end task: read, checked and numbered.

The six tasks of the DAS benchmark (Ke et al. 2023; the paper, appendix A) are known by name: what
their labels are, how long a copy of the model is trained on them, and which F1 is reported.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.hub_name import from_hub
from pipeline.progress import say
from pipeline.recipe import EndTask, EndTasks

Metric = Literal["macro_f1", "micro_f1"]
SPLITS = ("train", "dev", "test")
OTHER_NAMES = {"dev": ("validation", "val")}
EPOCHS = 10  # of a task that is not known
SHOWN = 8  # labels in a message


@dataclass(frozen=True)
class Known:
    """A task of the benchmark; epochs as in its code (ContinualLM)."""

    labels: tuple[str, ...]
    epochs: int
    metric: Metric = "macro_f1"
    absent_terms: Literal["fail", "keep"] = "fail"


_POLARITY = ("negative", "positive")
KNOWN = {
    "restaurant": Known(("negative", "neutral", "positive"), 5),
    # Some terms of these two are meant by their sentence, not said in it.
    "phone": Known(_POLARITY, 15, absent_terms="keep"),
    "camera": Known(_POLARITY, 15, absent_terms="keep"),
    "acl_arc": Known(
        ("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses"), 10
    ),
    "scierc": Known(
        (
            "COMPARE", "CONJUNCTION", "EVALUATE-FOR", "FEATURE-OF", "HYPONYM-OF", "PART-OF",
            "USED-FOR",
        ),
        5,
    ),
    "chemprot": Known(
        (
            "ACTIVATOR", "AGONIST", "AGONIST-ACTIVATOR", "AGONIST-INHIBITOR", "ANTAGONIST",
            "DOWNREGULATOR", "INDIRECT-DOWNREGULATOR", "INDIRECT-UPREGULATOR", "INHIBITOR",
            "PRODUCT-OF", "SUBSTRATE", "SUBSTRATE_PRODUCT-OF", "UPREGULATOR",
        ),
        10,
        "micro_f1",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    text: str
    term: str | None  # what the text is judged on
    label: int  # index into the task's labels


@dataclass(frozen=True)
class Task:
    """An end task, ready to be trained on."""

    key: str  # of the recipe, for messages
    name: str  # restaurant, ...
    labels: list[str]
    splits: dict[str, list[Row]]  # train, test and, where there is one, dev
    metric: Metric
    epochs: int
    lr: float
    source: str  # where the rows are from
    digest: str  # of the rows and labels


def load_task(key: str, settings: EndTasks, tell: bool = False) -> Task:
    """Read a task's splits and check every row.

    tell: say where terms are absent that may be.

    Raises:
        UserError: no such files or data set; a split is missing or empty; a row without text or
            with an unknown label; a class without a training row; a term that does not occur in
            its sentence, where that is not allowed. It names the first such row.
    """
    task = settings.tasks[key]
    name = task.task or key
    where = f"evaluate.end_tasks.tasks.{key}"
    if task.task is not None and task.task not in KNOWN:
        raise UserError(f"{where}.task: {task.task!r} is none of {', '.join(KNOWN)}")
    known = KNOWN.get(name)
    rows, source = _from_hub(task, where) if task.hub else _from_files(name, task, settings, where)
    labels = _labels(task, known, rows["train"], where)
    absent = task.absent_terms or (known.absent_terms if known else "fail")
    splits = {
        split: _numbered(found, task, labels, absent, where, tell) for split, found in rows.items()
    }
    trained = {row.label for row in splits["train"]}
    for i, label in enumerate(labels):
        if i not in trained:
            raise UserError(
                f"{where}: no training row of {source} has the label {label!r}; add some, or list "
                "the others under `labels`"
            )
    content = json.dumps([labels, {k: [vars(r) for r in v] for k, v in splits.items()}])
    return Task(
        where,
        name,
        labels,
        splits,
        task.metric or (known.metric if known else "macro_f1"),
        task.epochs or (known.epochs if known else EPOCHS),
        task.lr or settings.lr,
        source,
        hashlib.sha256(content.encode()).hexdigest(),
    )


# Where a row is, and what it holds.
Found = list[tuple[str, dict[str, Any]]]


def _from_files(
    name: str, task: EndTask, settings: EndTasks, where: str
) -> tuple[dict[str, Found], str]:
    folder = Path(task.files) if task.files else Path(settings.files or ".", name)
    if not folder.is_dir():
        key = f"{where}.files" if task.files else "evaluate.end_tasks.files"
        raise UserError(f"{key}: no such folder: {folder} (with train, dev and test .jsonl[.gz])")
    found = {}
    for split in SPLITS:
        names = [f"{n}{end}" for n in _names(split) for end in (".jsonl", ".jsonl.gz")]
        path = next((folder / n for n in names if (folder / n).is_file()), None)
        if path:
            found[split] = list(_read(path))
    _require_splits(found, str(folder), where)
    return found, str(folder)


def _from_hub(task: EndTask, where: str) -> tuple[dict[str, Found], str]:
    import datasets

    datasets.disable_progress_bars()
    try:
        there = from_hub(
            f"{where}.hub", str(task.hub), lambda: datasets.load_dataset(str(task.hub))
        )
    except UserError:
        raise
    except Exception as error:  # of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}.hub: {task.hub} cannot be opened ({reason}). Give local `files` instead"
        ) from None
    found: dict[str, Found] = {}
    for split in SPLITS:
        name = next((n for n in _names(split) if n in there), None)
        if name:
            features = there[name].features
            named = {k: f.names for k, f in features.items() if hasattr(f, "names")}
            found[split] = [
                (f"{task.hub} {name}, row {i}", {k: _class(v, named.get(k)) for k, v in r.items()})
                for i, r in enumerate(there[name], start=1)
            ]
    _require_splits(found, str(task.hub), where)
    return found, f"hub {task.hub}"


def _names(split: str) -> tuple[str, ...]:
    return (split, *OTHER_NAMES.get(split, ()))


def _class(value: Any, names: list[str] | None) -> Any:
    """A class that the data set keeps as a number, by its name."""
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def _require_splits(found: dict[str, Found], source: str, where: str) -> None:
    for split in ("train", "test"):
        if split not in found:
            raise UserError(
                f"{where}: {source} has no {split} split; it has {', '.join(found) or 'none'}"
            )
    for split, rows in found.items():
        if not rows:
            raise UserError(f"{where}: the {split} split of {source} has no rows")


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{place}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{place}: not a JSON object but {type(row).__name__}")
                yield place, row
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _fields(task: EndTask, row: dict[str, Any]) -> tuple[str, str | None, str]:
    """The names of the text, the term (None: texts are judged as a whole) and the label."""
    term = task.term_field or ("term" if "term" in row else None)
    text = task.text_field or ("sentence" if term else "text")
    return text, term, task.label_field or ("polarity" if term else "label")


def _labels(task: EndTask, known: Known | None, train: Found, where: str) -> list[str]:
    _, _, field = _fields(task, train[0][1])
    if task.labels is not None:
        labels = task.labels
    elif known:
        labels = list(known.labels)
    else:
        labels = sorted({str(row[field]) for _, row in train if row.get(field) not in (None, "")})
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(
            f"{where}: a classification needs two labels or more, each once; here are "
            f"{_some(labels)} (field {field!r})"
        )
    return labels


def _numbered(
    found: Found, task: EndTask, labels: list[str], absent: str, where: str, tell: bool
) -> list[Row]:
    text, term, label = _fields(task, found[0][1])
    numbers = {name: i for i, name in enumerate(labels)}
    rows, without = [], []
    for place, row in found:
        for key in filter(None, (text, term, label)):
            if key not in row:
                raise UserError(f"{place}: no field {key!r}; it has {', '.join(row) or 'none'}")
            if key != label and not (isinstance(row[key], str) and row[key].strip()):
                raise UserError(f"{place}: its {key!r} is {row[key]!r}, no text")
        if str(row[label]) not in numbers:
            raise UserError(
                f"{place}: its {label} {row[label]!r} is none of the labels of {where}: "
                f"{_some(labels)}"
            )
        judged = row[term] if term else None
        if judged and judged.strip().lower() not in row[text].lower():
            without.append(f"{place}: its term {judged!r} does not occur in {row[text]!r}")
        rows.append(Row(row[text], judged, numbers[str(row[label])]))
    if without and absent == "fail":
        raise UserError(
            f"{without[0]}; {len(without)} row(s) of this split are so. Mend them, or set "
            f"{where}.absent_terms=keep"
        )
    if without and tell:
        say(f"{len(without)} of {len(rows)} terms are not in their sentence, kept: {without[0]}")
    return rows


def _some(labels: list[str]) -> str:
    shown = ", ".join(map(repr, labels[:SHOWN]))
    return shown + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "") or "none"
