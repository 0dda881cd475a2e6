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

from pipeline.data.embedded import EMBEDDED, choices, embedded_documents
from pipeline.errors import UserError

if TYPE_CHECKING:  # heavy, or importing this module
    from datasets import IterableDataset

    from pipeline.recipe import Domain

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


def check_domain(name: str, domain: "Domain") -> list[str]:
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
    return found


def read_documents(
    domain: "Domain", split: Literal["train", "heldout"], bad: BadLines
) -> "IterableDataset":
    """The documents of one side of a domain, in a fixed order, as rows `{"text": str}`.

    The result streams and resumes exactly (`state_dict`, `load_state_dict`). Rows that cannot be
    used are counted in `bad` while iterating, in the iterating process. `max_documents` counts
    documents before the split. Relative paths start at the working directory.

    Raises:
        UserError: here, for sources that cannot be opened; while iterating, for a corpus without
            a document, a text field that no row of a file has, and too many bad rows.
    """
    heldout = split == "heldout"
    keep, files = _side(heldout, domain.heldout_fraction), domain.files
    if domain.heldout_files or domain.heldout_split:
        keep = _everything
    if heldout and domain.heldout_files:
        files = domain.heldout_files
    elif domain.hub:
        part = domain.heldout_split if heldout and domain.heldout_split else domain.split
        return _from_hub(domain, part, keep, bad)

    if files:
        paths = _resolve(files)
        where = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    else:
        texts = embedded_documents(domain.embedded or "")
        where = f"the embedded corpus {domain.embedded!r}"

    def read() -> Iterator[str]:
        if not files:
            return iter(texts)
        by_line = domain.txt_documents == "line"
        return (t for path in paths for t in read_file(path, domain.text_field, bad, by_line))

    def rows() -> Iterator[dict[str, str]]:
        seen = kept = 0
        for text in itertools.islice(read(), domain.max_documents):
            seen += 1
            if keep(text):
                kept += 1
                yield {"text": text}
        if not kept:
            raise UserError(_nothing(where, split, seen, domain.heldout_fraction, bad))

    import datasets

    return datasets.IterableDataset.from_generator(rows)


def read_file(path: str, text_field: str, bad: BadLines, by_line: bool = False) -> Iterator[str]:
    """The texts of one local file (.jsonl and .txt plain, .gz or .zst; .parquet), in order.

    In a text file, documents are separated by blank lines; with `by_line`, each line is one.
    """
    if path.endswith(".parquet"):
        return _read_parquet(path, text_field, bad)
    if ".txt" in Path(path).suffixes:
        return _read_text(path, bad, by_line)
    return _read_jsonl(path, text_field, bad)


def _everything(text: str) -> bool:
    return True


def _side(heldout: bool, fraction: float) -> Callable[[str], bool]:
    """Which texts fall on the wanted side of the split by hash."""
    limit = fraction * 2**64

    def keep(text: str) -> bool:
        value = int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big")
        return (value < limit) == heldout

    return keep


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


def _no_field(where: str, text_field: str, fields: Iterable[str]) -> UserError:
    names = ", ".join(sorted(map(repr, fields))) or "none"
    return UserError(
        f"{where}: no row has the text field {text_field!r}; fields seen: {names}. "
        "Set `text_field` of the domain to the one that holds the text."
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


def _read_jsonl(path: str, text_field: str, bad: BadLines) -> Iterator[str]:
    found = False
    fields: set[str] = set()
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
        if text_field not in row:
            fields |= row.keys()
            if not found and bad.count >= bad.budget:  # the likelier mistake is the field's name
                raise _no_field(path, text_field, fields)
            bad.add(path, number, f"no field {text_field!r}")
            continue
        found = True
        if reason := _problem(row[text_field]):
            bad.add(path, number, reason)
        else:
            yield row[text_field]
    if fields and not found:
        raise _no_field(path, text_field, fields)


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


def _read_parquet(path: str, text_field: str, bad: BadLines) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_field(path, text_field, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if reason := _problem(text):
                        bad.add(path, number, reason)
                    else:
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        bad.add(path, number + 1, f"damaged parquet file: {str(error).splitlines()[0]}")


def _from_hub(
    domain: "Domain", split: str, keep: Callable[[str], bool], bad: BadLines
) -> "IterableDataset":
    """A data set of the hub (or a folder in its layout), streamed."""
    import datasets

    name, text_field = domain.hub or "", domain.text_field
    try:
        rows = datasets.load_dataset(
            name, domain.hub_config, split=split, revision=domain.revision, streaming=True
        )
        fields = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # many kinds: no network, no such name, config, split, revision
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"data set {name!r}, split {split!r}, cannot be opened ({type(error).__name__}: "
            f"{reason}). Check `hub`, `hub_config`, `split`, `revision` and the network."
        ) from None
    if text_field not in fields:
        raise _no_field(f"data set {name!r}, split {split!r}", text_field, fields)
    where = f"{name}/{split}"

    def wanted(row: dict, index: int) -> bool:
        if reason := _problem(row[text_field]):
            bad.add(where, index + 1, reason)
            return False
        return keep(row[text_field])

    if domain.max_documents:
        rows = rows.take(domain.max_documents)
    return rows.filter(wanted, with_indices=True).map(
        lambda row: {"text": row[text_field]}, remove_columns=fields
    )
