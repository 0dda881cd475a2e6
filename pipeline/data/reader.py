"""Documents of a domain: embedded, from local files, or from the hub.

Local files are read tolerantly: a broken line or a truncated archive costs that line, not the
file. What was skipped is remembered with file and line (`BadLines`), and too much of it is an
error. Held-out documents are split off by a hash of their text, so that duplicates fall on one
side and neither ranks nor the order of files matter.
"""

import glob
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.data.conversations import conversation_of
from pipeline.data.embedded import EMBEDDED, INSTRUCTIONS, choices, embedded_documents
from pipeline.data.instruct import Conversation, Document, Example, document_text
from pipeline.errors import UserError
from pipeline.recipe import Domain

if TYPE_CHECKING:  # heavy
    from datasets import IterableDataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")
EXAMPLES = 20  # bad lines that are remembered one by one


@dataclass
class BadLines:
    """Rows that were skipped, each counted once however often its file is read.

    `examples` holds the first 20 as (file, line from 1, reason). More than `budget` of them raise
    UserError.
    """

    budget: int = 100
    count: int = 0
    examples: list[tuple[str, int, str]] = field(default_factory=list)
    _seen: set[tuple[str, int]] = field(default_factory=set, repr=False)

    def add(self, file: str, line: int, reason: str) -> None:
        """Count one bad row."""
        if (file, line) in self._seen:
            return
        self._seen.add((file, line))
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((file, line, reason))
        if self.count > self.budget:
            raise UserError(
                f"more than {self.budget} rows cannot be read (data.bad_lines); the first are:\n"
                f"{self.listing()}\nMend the files, or raise data.bad_lines to skip such rows."
            )

    def listing(self, count: int = 5) -> str:
        """The first examples, one `file:line: reason` per line."""
        return "\n".join(f"  {f}:{n}: {reason}" for f, n, reason in self.examples[:count])


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
            domain.embedded in EMBEDDED,
            ".embedded",
            f"no embedded corpus is called {domain.embedded!r}; choose one of: {choices()}",
        )
    for key in ("files", "heldout_files"):
        for pattern in getattr(domain, key):
            try:
                _resolve([pattern])
            except UserError as error:
                found.append(f"data.domains.{name}.{key}: {error}")
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
    if domain.embedded in EMBEDDED:
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
            not any(".txt" in Path(f).suffixes for f in [*domain.files, *domain.heldout_files]),
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
            not any(".txt" in Path(f).suffixes for f in [*domain.files, *domain.heldout_files]),
            ".files",
            "a .txt file has no fields for prompt and response; use .jsonl or .parquet",
        )
    return found


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
    if heldout and domain.heldout_files:
        files = domain.heldout_files
    elif domain.hub:
        part = domain.heldout_split if heldout and domain.heldout_split else domain.split
        return _from_hub(domain, part, keep, bad)

    if files:
        paths = _resolve(files)
        where = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    else:
        embedded = embedded_documents(domain.embedded or "")
        where = f"the embedded corpus {domain.embedded!r}"

    def read() -> Iterator[Document]:
        if not files:
            return iter(embedded)
        return (d for path in paths for d in read_file(path, domain, bad))

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
    """The documents of one local file (.jsonl and .txt plain, .gz or .zst; .parquet), in order.

    In a text file, documents are separated by blank lines, or lines (`txt_documents`).
    """
    if ".txt" in Path(path).suffixes:
        return _read_text(path, bad, domain.txt_documents == "line")
    rows = _read_parquet if path.endswith(".parquet") else _read_jsonl
    return rows(path, _Fields.of(domain), bad)


@dataclass(frozen=True)
class _Fields:
    """Which fields of a row make a document, and what it is then."""

    needed: list[str]
    optional: list[str]
    instruction: bool
    chat: bool = False

    @classmethod
    def of(cls, domain: Domain) -> "_Fields":
        if domain.chat_field is not None:
            return cls([domain.chat_field], [], False, chat=True)
        if domain.instruction is None:
            return cls([domain.text_field], [], False)
        names = domain.instruction
        return cls([names.prompt, names.response], [names.input] if names.input else [], True)

    def document(self, row: dict[str, Any]) -> tuple[Document, str | None]:
        """The document, and why it cannot be used (or None)."""
        if self.chat:
            conversation, problem = conversation_of(row[self.needed[0]])
            return conversation or "", problem
        values = [row[name] for name in self.needed]
        more = ["" if row.get(name) is None else row[name] for name in self.optional]
        for name, value in zip(self.needed, values, strict=True):
            if reason := _problem(value):
                return "", reason.replace(
                    "the text", f"{name!r}" if self.instruction else "the text"
                )
        if not self.instruction:
            return values[0], None
        context = more[0] if more else ""
        if context != "" and (reason := _problem(context)) and "empty" not in reason:
            return "", reason.replace("the text", f"{self.optional[0]!r}")
        return Example(values[0], context, values[1]), None


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
        skipped = f" ({bad.count} rows were skipped:\n{bad.listing()})" if bad.count else ""
        return f"{where}: no documents{skipped}"
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
            if not path.endswith(SUFFIXES):
                raise UserError(f"{path}: unknown file type; known are {', '.join(SUFFIXES)}")
        files |= dict.fromkeys(found)
    return list(files)


def _problem(text: object) -> str | None:
    """Why a value is not a document, or None."""
    if not isinstance(text, str):
        return f"the text is not a string but {type(text).__name__}"
    if not text.strip():
        return "the text is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not valid Unicode (lone surrogate)"
    return None


def _no_field(where: str, wanted: _Fields, seen: Iterable[str]) -> UserError:
    names = ", ".join(sorted(map(repr, seen))) or "none"
    missing = " and ".join(repr(n) for n in wanted.needed if n not in set(seen))
    fix = (
        "Set `prompt`, `input` and `response` of the domain's `instruction`."
        if wanted.instruction
        else "Set `chat_field` of the domain to the one that holds the messages."
        if wanted.chat
        else "Set `text_field` of the domain to the one that holds the text."
    )
    return UserError(
        f"{where}: no row has the field {missing or wanted.needed}; fields seen: {names}. {fix}"
    )


def _chunks(path: str) -> Iterator[bytes]:
    """Decompressed pieces of a file; EOFError or ValueError after the last good piece."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from None
    with file:
        new: Callable[[], Any]
        if path.endswith(".gz"):
            new = partial(zlib.decompressobj, wbits=31)
        elif path.endswith(".zst"):
            import zstandard

            new = zstandard.ZstdDecompressor().decompressobj
        else:
            while chunk := file.read(1 << 20):
                yield chunk
            return
        decoder = None
        while chunk := file.read(1 << 16):
            while chunk:  # an archive may hold several members or frames
                if decoder is None or decoder.eof:
                    decoder = new()
                try:
                    yield decoder.decompress(chunk)
                except Exception as error:  # zlib.error, zstandard.ZstdError
                    raise ValueError(f"damaged archive: {error}") from None
                chunk = decoder.unused_data if decoder.eof else b""
        if decoder is not None and not decoder.eof:
            raise EOFError("truncated archive")


def _lines(path: str, bad: BadLines) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; what stands behind damage is given up and counted as one bad line."""
    number, rest = 0, [b""]
    try:
        for chunk in _chunks(path):
            *complete, tail = chunk.split(b"\n")
            if complete:
                complete[0] = b"".join(rest) + complete[0]
                rest = []
            rest.append(tail)  # a list, so that one long line costs linear time
            for line in complete:
                number += 1
                yield number, line
    except (EOFError, ValueError) as error:
        bad.add(path, number + 1, str(error))
    else:
        if last := b"".join(rest):
            yield number + 1, last


def _read_jsonl(path: str, fields: _Fields, bad: BadLines) -> Iterator[Document]:
    found = False
    seen: set[str] = set()
    for number, line in _lines(path, bad):
        if not line.strip():
            continue
        try:
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except (ValueError, RecursionError) as error:
            bad.add(path, number, f"not JSON: {error}")
            continue
        if not isinstance(row, dict):
            bad.add(path, number, f"not a JSON object but {type(row).__name__}")
            continue
        missing = [name for name in fields.needed if name not in row]
        if missing:
            seen |= row.keys()
            if not found and bad.count >= bad.budget:  # the likelier mistake is the field's name
                raise _no_field(path, fields, seen)
            bad.add(path, number, f"no field {missing[0]!r}")
            continue
        found = True
        document, reason = fields.document(row)
        if reason:
            bad.add(path, number, reason)
        else:
            yield document
    if seen and not found:
        raise _no_field(path, fields, seen)


def _read_text(path: str, bad: BadLines, by_line: bool) -> Iterator[str]:
    block: list[bytes] = []
    first = 1
    # a blank line behind the last one closes the last block
    for number, line in itertools.chain(_lines(path, bad), [(0, b"")]):
        if line.strip():
            if not block:
                first = number
            block.append(line)
        if block and (by_line or not line.strip()):
            try:
                text = b"\n".join(block).decode("utf-8-sig").replace("\r\n", "\n")
                yield text.rstrip("\r")
            except UnicodeDecodeError:
                bad.add(path, first, "not UTF-8")
            block = []


def _read_parquet(path: str, fields: _Fields, bad: BadLines) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not set(fields.needed) <= set(names):
                raise _no_field(path, fields, names)
            columns = [n for n in fields.needed + fields.optional if n in names]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    document, reason = fields.document(row)
                    if reason:
                        bad.add(path, number, reason)
                    else:
                        yield document
    except (pyarrow.ArrowException, OSError) as error:
        bad.add(path, number + 1, f"damaged parquet file: {str(error).splitlines()[0]}")


def _from_hub(domain: Domain, split: str, keep: Keep, bad: BadLines) -> "IterableDataset":
    """A data set of the hub (or a folder in its layout), streamed."""
    import datasets

    name, fields = domain.hub or "", _Fields.of(domain)
    try:
        rows = datasets.load_dataset(
            name, domain.hub_config, split=split, revision=domain.revision, streaming=True
        )
        columns = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # many kinds: no network, no such name, config, split, revision
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"data set {name!r}, split {split!r}, cannot be opened ({type(error).__name__}: "
            f"{reason}). Check `hub`, `hub_config`, `split`, `revision` and the network."
        ) from None
    if not set(fields.needed) <= set(columns):
        raise _no_field(f"data set {name!r}, split {split!r}", fields, columns)
    where = f"{name}/{split}"

    def wanted(row: dict, index: int) -> bool:
        document, reason = fields.document(row)
        if reason:
            bad.add(where, index + 1, reason)
            return False
        return keep(_row(document))

    if domain.max_documents:
        rows = rows.take(domain.max_documents)
    return rows.filter(wanted, with_indices=True).map(
        lambda row: _row(fields.document(row)[0]), remove_columns=columns
    )
