"""Documents of a domain: embedded, from local files, or from the hub.

Files are read tolerantly: a broken line or a truncated archive costs that line, not the file. What
was skipped is remembered with file and line (`BadLines`); too much of it, or a file of which
nothing can be used, is an error. Held-out documents are split off by a hash of their text, so that
duplicates fall on one side and neither ranks nor the order of files matter.
"""

import glob
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.data.bad_lines import BadLines
from pipeline.data.embedded import EMBEDDED, INSTRUCTIONS, choices, embedded_documents
from pipeline.data.formats.fields import Fields
from pipeline.data.formats.jsonl import read_jsonl
from pipeline.data.formats.parquet import read_parquet
from pipeline.data.formats.raw import SUFFIXES, kind_by_name, layout_of
from pipeline.data.formats.text import read_text
from pipeline.data.hub import hub_files, stream_hub
from pipeline.data.instruct import Conversation, Document, Example, document_text
from pipeline.data.tasks import task_problems
from pipeline.data.toy_tasks import TOY_TASKS
from pipeline.errors import UserError
from pipeline.hub_name import missing_folder
from pipeline.recipe import Domain

if TYPE_CHECKING:  # heavy
    from datasets import IterableDataset


def check_domain(name: str, domain: Domain) -> list[str]:
    """Problems of a domain's settings that show without reading the corpus, as `key: problem; fix`.

    `name` is the domain's key in the recipe. Takes milliseconds and imports nothing heavy.
    """
    found = []

    def need(condition: object, key: str, message: str) -> None:
        if not condition:
            found.append(f"data.domains.{name}{key}: {message}")

    sources = [s for s in ("embedded", "files", "hub") if getattr(domain, s)]
    given = f"not {' and '.join(sources)}" if sources else "none is there"
    need(len(sources) == 1, "", f"give exactly one of `embedded`, `files` and `hub`; {given}")
    if domain.embedded:
        need(
            domain.embedded in EMBEDDED or domain.embedded in TOY_TASKS,
            ".embedded",
            f"no embedded corpus is called {domain.embedded!r}; choose one of: {choices()}",
        )
    sides: dict[str, set[Path]] = {"files": set(), "heldout_files": set()}
    for key, side in sides.items():
        for pattern in getattr(domain, key):
            try:
                side |= {Path(path).resolve() for path in _resolve([pattern])}
            except UserError as error:
                found.append(f"data.domains.{name}.{key}: {error}")
    both = sorted(map(str, sides["files"] & sides["heldout_files"]))
    need(
        not both,
        ".heldout_files",
        f"{(both or [''])[0]} is in `files` too, and would be trained on; leave it out there",
    )
    need(
        not domain.hub or domain.heldout_split != domain.split,
        ".heldout_split",
        f"{domain.heldout_split!r} is the split that is trained on; name another one",
    )
    if domain.hub and "://" not in domain.hub:  # a URL is refused where it is opened
        problem = missing_folder(domain.hub) or ""
        need(not problem, ".hub", problem)
    for key in ("hub_config", "revision", "heldout_split"):
        need(
            domain.hub or not getattr(domain, key),
            f".{key}",
            "has no effect without `hub`; remove it",
        )
    need(
        not (domain.heldout_files and domain.heldout_split),
        ".heldout_split",
        "give at most one of `heldout_files` and `heldout_split`",
    )
    need(
        domain.heldout_files or domain.heldout_split or 0 < domain.heldout_fraction < 1,
        ".heldout_fraction",
        f"{domain.heldout_fraction} is outside (0, 1); 0.05 holds out 5% of the documents",
    )
    need(
        domain.max_documents is None or domain.max_documents >= 1,
        ".max_documents",
        f"{domain.max_documents} is less than 1; leave it out to read everything",
    )
    need(domain.text_field, ".text_field", "is empty; name the field that holds the text")
    need(0 < domain.sample <= 1, ".sample", f"{domain.sample} is outside (0, 1]; 1 takes all")
    need(
        domain.sample < 1 or domain.sample_seed == 0,
        ".sample_seed",
        "has no effect without `sample`; remove it",
    )
    if domain.embedded in TOY_TASKS:
        need(domain.task, ".task", "give `instruction` and `labels`: this corpus is a task")
    if domain.embedded in EMBEDDED:
        need(not domain.task, ".task", "has no effect on an embedded text; remove it")
        pairs = domain.embedded in INSTRUCTIONS
        need(
            pairs == (domain.instruction is not None),
            ".instruction",
            "give {}: this corpus consists of prompts and responses"
            if pairs
            else f"the embedded corpus {domain.embedded!r} is text without prompts; remove it",
        )
    if domain.chat_field is not None:
        need(domain.chat_field, ".chat_field", "is empty; name the field that holds the messages")
        need(
            not domain.instruction,
            ".chat_field",
            "give at most one of `chat_field` and `instruction`",
        )
        need(not domain.embedded, ".chat_field", "an embedded corpus has no conversations")
        need(
            domain.text_field == "text",
            ".text_field",
            "has no effect with `chat_field`; remove it",
        )
        need(
            not any(kind_by_name(f) == "text" for f in [*domain.files, *domain.heldout_files]),
            ".files",
            "a .txt file has no field for messages; use .jsonl or .parquet",
        )
    if domain.instruction:
        fields = domain.instruction
        need(
            domain.text_field == "text",
            ".text_field",
            "has no effect with `instruction`; remove it",
        )
        need(fields.prompt and fields.response, ".instruction", "a field's name is empty")
        need(
            not any(kind_by_name(f) == "text" for f in [*domain.files, *domain.heldout_files]),
            ".files",
            "a .txt file has no fields for prompt and response; use .jsonl or .parquet",
        )
    return found + task_problems(name, domain)


def read_documents(
    domain: Domain, split: Literal["train", "heldout"], bad: BadLines
) -> "IterableDataset":
    """The documents of one side of a domain, in a fixed order, as rows: `{"text": str}`, or
    `{"prompt", "context", "response"}` of an instruction domain (`document_of` a row).

    The result streams and resumes exactly (`state_dict`, `load_state_dict`). Rows that cannot be
    used are counted in `bad` while iterating, in the iterating process. `max_documents` counts
    documents before the split, which comes before the `sample`. Relative paths start at the
    working directory.

    Raises:
        UserError: here, for sources that cannot be opened; while iterating, for a corpus without
            a document, a field that no row of a file has, and too many bad rows.
    """
    heldout = split == "heldout"
    keep, files = _side(heldout, domain.heldout_fraction), domain.files
    if domain.heldout_files or domain.heldout_split:
        keep = _everything
    if not heldout and domain.sample < 1:
        keep = _and(keep, _sampled(domain.sample, domain.sample_seed))
    split_name = domain.split
    if heldout and domain.heldout_files:
        files = domain.heldout_files
    elif heldout and domain.heldout_split:
        split_name = domain.heldout_split
    embedded, hub = embedded_documents(domain.embedded) if domain.embedded else [], None
    if files:
        paths = _resolve(files)
        where = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    elif domain.hub:
        hub = hub_files(domain, split_name)
        where = f"data set {domain.hub!r}, split {split_name!r}"
    else:
        where = f"the embedded corpus {domain.embedded!r}"

    def read() -> Iterator[Document]:
        if files:
            return (d for path in paths for d in read_file(path, domain, bad))
        if domain.hub:
            return read_hub(domain, split_name, bad, hub)
        return iter(embedded)

    def rows() -> Iterator[dict[str, str]]:
        seen = kept = 0
        for document in itertools.islice(read(), domain.max_documents):
            seen += 1
            row = _row(document)
            if keep(row):
                kept += 1
                yield row
        if not kept:
            raise UserError(_nothing(where, split, seen, domain.heldout_fraction, bad))

    import datasets

    return datasets.IterableDataset.from_generator(rows)


def document_of(row: dict[str, Any]) -> Document:
    """The document of a row that `read_documents` gives."""
    if "messages" in row:
        return Conversation(tuple((role, content) for role, content in row["messages"]))
    return row["text"] if "text" in row else Example(**row)


def read_file(path: str, domain: Domain, bad: BadLines) -> Iterator[Document]:
    """The documents of one file (JSON lines or an array, text, parquet; plain, gzip or zstd).

    In a text file, documents are separated by blank lines, or lines (`txt_documents`).

    Raises:
        UserError: while iterating, for a file that cannot be opened, holds no rows, lacks the
            field, or of which not one row can be used although it has some.
    """
    layout = layout_of(path)
    documents: Iterator[Document]
    if layout.rows == "text":
        if domain.instruction:
            raise UserError(f"{path}: plain text has no fields for prompt and response")
        documents = read_text(path, layout, bad, domain.txt_documents == "line")
    elif layout.rows == "parquet":
        documents = read_parquet(path, Fields.of(domain), bad)
    else:
        documents = read_jsonl(path, layout, Fields.of(domain), bad)
    before, some = bad.count, False
    for document in documents:
        some = True
        yield document
    if not some and bad.count > before:
        lines = [f"  {f}:{n}: {reason}" for f, n, reason in bad.examples if f == path][:5]
        listing = "\n".join(["the first are:", *lines] if lines else [])
        raise UserError(
            f"{path}: not one of its rows can be used, {bad.count - before} are broken; {listing}"
        )


def read_hub(
    domain: Domain, split: str, bad: BadLines, files: list[str] | None = None
) -> Iterator[Document]:
    """The documents of a split; files: those that `hub_files` found, looked up if not given."""
    files = hub_files(domain, split) if files is None else files
    if files is None:
        return stream_hub(domain, split, bad)
    return (d for path in files for d in read_file(path, domain, bad))


def _row(document: Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document._asdict()


def _digest(row: dict[str, Any], salt: str = "") -> int:
    """64 bits of a hash of a document."""
    text = document_text(document_of(row))
    content = f"{salt}\0{text}" if salt else text
    return int.from_bytes(hashlib.sha1(content.encode()).digest()[:8], "big")


Keep = Callable[[dict[str, str]], bool]


def _everything(row: dict[str, str]) -> bool:
    return True


def _side(heldout: bool, fraction: float) -> Keep:
    """Which documents fall on the wanted side of the split by hash."""
    limit = fraction * 2**64
    return lambda row: (_digest(row) < limit) == heldout


def _sampled(fraction: float, seed: int) -> Keep:
    limit = fraction * 2**64
    return lambda row: _digest(row, f"sample {seed}") < limit


def _and(first: Keep, second: Keep) -> Keep:
    return lambda row: first(row) and second(row)


def _nothing(where: str, split: str, seen: int, fraction: float, bad: BadLines) -> str:
    if not seen:
        skipped = f" ({bad.describe()}:\n{bad.listing()})" if bad.count else ""
        blank = f" (all {bad.blank} rows are blank)" if bad.blank and not bad.count else ""
        return f"{where}: no documents{skipped}{blank}"
    fix = "give `heldout_files`, or raise" if split == "heldout" else "lower"
    return (
        f"{where}: none of its {seen} documents falls into the {split} part of the split by hash "
        f"with heldout_fraction {fraction}; {fix} `heldout_fraction`"
    )


def _resolve(patterns: list[str]) -> list[str]:
    """Existing files of paths and globs, each once, sorted within a glob."""
    files: dict[str, None] = {}
    for pattern in patterns:
        pattern = str(Path(pattern).expanduser())
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            kind = "no file matches" if glob.has_magic(pattern) else "no such file:"
            raise UserError(f"{kind} {pattern} (relative paths start at {Path.cwd()})")
        for path in found:
            if Path(path).is_dir():
                raise UserError(f"{path} is a folder; write a glob such as {path}/*.jsonl.gz")
            if kind_by_name(path) is None:
                raise UserError(f"{path}: unknown file type; known are {', '.join(SUFFIXES)}")
        files |= dict.fromkeys(found)
    return list(files)
