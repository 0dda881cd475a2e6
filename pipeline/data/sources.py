"""What a domain's documents come from, in units that one process reads, and how much it is."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.bad_lines import BadLines
from pipeline.data.embedded import embedded_documents, embedded_version
from pipeline.data.encode import Encoder
from pipeline.data.formats.raw import layout_of
from pipeline.data.hub import hub_files, hub_parts, stream_hub
from pipeline.data.instruct import Document, Example, document_text
from pipeline.data.prepared import Side, fingerprint
from pipeline.data.reader import _digest, _resolve, read_file
from pipeline.data.tasks import drawn, renderer
from pipeline.errors import UserError
from pipeline.recipe import Domain, Task

UNIT = 256 << 20  # bytes of files in a unit: small files are read together
HEAD = 1 << 20  # bytes of a file that are read to estimate the rest
ESTIMATED_FROM = 8  # files


@dataclass(frozen=True)
class Unit:
    """Some of a domain's documents, read by one process into files of their own.

    side: where all of them go; None: each by its hash.
    files: of the domain; of a split of a data set where `hub_split` is given too.
    hub_split: without files, `datasets` reads it: part `hub_part` (number from 0, of how many).
    Neither: the embedded corpus.
    """

    number: int
    side: Side | None
    files: tuple[str, ...] = ()
    hub_split: str | None = None
    hub_part: tuple[int, int] = (0, 1)

    @property
    def place(self) -> str:
        """Where it is read from, in messages."""
        return self.files[0] if self.files else self.hub_split or "the embedded corpus"


def units_of(domain: Domain) -> list[Unit]:
    """In the order in which the documents count. Raises UserError for files that are not there."""
    found: list[Unit] = []
    wanted: list[tuple[Side | None, list[str], str | None]]
    if domain.heldout_files or domain.heldout_split:
        wanted = [
            ("train", domain.files, domain.split),
            ("heldout", domain.heldout_files, domain.heldout_split),
        ]
    else:
        wanted = [(None, domain.files, domain.split)]
    for side, files, split in wanted:
        if files:
            groups = _groups(_resolve(files), together=domain.counted)
            found += [Unit(len(found) + i, side, group) for i, group in enumerate(groups)]
        elif domain.hub:
            found += _hub_units(domain, side, str(split), len(found))
        else:
            found.append(Unit(len(found), side))
    return found


def _hub_units(domain: Domain, side: Side | None, split: str, first: int) -> list[Unit]:
    """Of a split; all of it where `max_documents` counts."""
    together = domain.counted
    files = hub_files(domain, split)
    if files is not None:
        groups = _groups(files, together)
        return [Unit(first + i, side, group, split) for i, group in enumerate(groups)]
    count = 1 if together else hub_parts(domain, split)
    return [Unit(first + i, side, (), split, (i, count)) for i in range(count)]


def _groups(paths: list[str], together: bool) -> list[tuple[str, ...]]:
    """Neighbouring files of up to UNIT bytes together, or all of them. The size of one behind an
    address is not asked for: it stands alone."""
    groups: list[list[str]] = []
    size = 0
    for path in paths:
        more = UNIT if "://" in path else Path(path).stat().st_size
        if not groups or (size + more > UNIT and not together):
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += more
    return [tuple(group) for group in groups]


def read_unit(unit: Unit, domain: Domain, bad: BadLines) -> Iterator[Document]:
    """Its documents; `max_documents` counts those of a side's sources in their order."""
    documents: Iterator[Document]
    if domain.task is not None:
        examples = _task_rows(unit, domain, domain.task, bad)
        sided = ((side_of(unit, domain, d := _digest(e._asdict())), d, e) for e in examples)
        return iter(drawn(sided, domain.task, unit.place))
    if unit.files:
        documents = (d for path in unit.files for d in read_file(path, domain, bad))
    elif unit.hub_split:
        documents = stream_hub(domain, unit.hub_split, bad, unit.hub_part)
    else:
        documents = iter(embedded_documents(domain.embedded or ""))
    return islice(documents, domain.max_documents)


def _task_rows(unit: Unit, domain: Domain, task: Task, bad: BadLines) -> Iterator[Example]:
    """All of them, as examples."""
    rows: Iterator[Document | None]
    if unit.files:
        rows = (d for path in unit.files for d in read_file(path, domain, bad))
    elif unit.hub_split:
        rows = stream_hub(domain, unit.hub_split, bad, unit.hub_part)
    else:
        render, name = renderer(task), str(domain.embedded)
        bare = enumerate(embedded_documents(name), start=1)
        rows = (render(e.prompt, e.response, name, i) for i, e in bare if isinstance(e, Example))
    return (row for row in rows if isinstance(row, Example))


def task_examples(domain: Domain, bad_lines: int) -> dict[str, list[Example]]:
    """The rows of a task by side ("train", "heldout"), as the prepared corpus has them."""
    found: dict[str, list[Example]] = {"train": [], "heldout": []}
    for unit in units_of(domain):
        for example in read_unit(unit, domain, BadLines(bad_lines)):
            if isinstance(example, Example):
                side = side_of(unit, domain, _digest(example._asdict()))
                found[side].append(example)
    return found


def side_of(unit: Unit, domain: Domain, digest: int) -> Side:
    """Where a document with this hash belongs."""
    return unit.side or ("heldout" if digest < domain.heldout_fraction * 2**64 else "train")


def sampled(row: dict[str, Any], domain: Domain) -> bool:
    """Whether a document to train on is in the domain's `sample`."""
    if domain.sample == 1:
        return True
    return _digest(row, f"sample {domain.sample_seed}") < domain.sample * 2**64


def identity(domain: Domain, units: list[Unit]) -> list[dict[str, Any]]:
    """What the documents come from, so that a change of it is seen: for a file its name, size, time
    of the last change (ns) and a hash of a sample of its bytes."""
    found: list[dict[str, Any]] = []
    splits: set[str] = set()
    for unit in units:
        if unit.hub_split:
            if unit.hub_split not in splits:
                found.append(_hub_identity(domain, unit.hub_split))
            splits.add(unit.hub_split)
        elif unit.files:
            found += [file_identity(path) for path in unit.files]
        else:
            version = embedded_version(str(domain.embedded))
            found.append({"name": domain.embedded, "version": version})
    return found


def file_identity(path: str) -> dict[str, Any]:
    try:
        state = Path(path).stat()
        sample = fingerprint(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return {"name": path, "size": state.st_size, "changed": state.st_mtime_ns, "sample": sample}


def _hub_identity(domain: Domain, split: str) -> dict[str, Any]:
    """Of a folder in the hub's layout its files, of a data set of the hub its commit."""
    known = {"name": domain.hub, "config": domain.hub_config, "split": split}
    folder = Path(str(domain.hub))
    if folder.is_dir():
        files = sorted(str(p) for p in folder.rglob("*") if p.is_file())
        return {**known, "files": [file_identity(f) for f in files]}
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(str(domain.hub), revision=domain.revision, timeout=20).sha
    except Exception as error:  # many kinds: no network, no such name or revision
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"data set {domain.hub!r} cannot be looked up ({type(error).__name__}: {reason}). "
            "Check `hub`, `revision` and the network."
        ) from None
    return {**known, "commit": commit}


@dataclass
class Estimate:
    """How much a domain is, from the beginnings of some of its files."""

    text_bytes: int
    tokens: int

    def disk_bytes(self, id_bytes: int, flags: int) -> int:
        """Of the prepared corpus; flags: bits beside each token's id."""
        return round(self.tokens * (id_bytes + flags / 8) + self.text_bytes / 100) + (1 << 16)


def estimate(domain: Domain, units: list[Unit], encoder: Encoder) -> Estimate | None:
    """None where it is not known before all is read (a data set of the hub)."""
    paths = [path for unit in units for path in unit.files]
    if any(unit.hub_split and not unit.files for unit in units) or any("://" in p for p in paths):
        return None
    if not paths:
        texts = [document_text(d) for d in embedded_documents(str(domain.embedded))]
        sample, size = texts[:200], float(sum(len(t.encode()) for t in texts))
    else:
        sizes = {path: Path(path).stat().st_size for path in paths}
        some_paths = paths[:: max(1, len(paths) // ESTIMATED_FROM)]
        sample, size = [], 0.0
        for path in some_paths:
            texts, stored = _head(path, domain)
            sample += texts
            size += sizes[path] * sum(len(t.encode()) for t in texts) / max(1, stored)
        size *= sum(sizes.values()) / max(1, sum(sizes[path] for path in some_paths))
    some = sum(len(t.encode()) for t in sample)
    if domain.max_documents and sample:
        size = min(size, domain.max_documents * some / len(sample))
    few = sample[:: max(1, len(sample) // 500)]
    tokens = sum(len(t.ids) for t in encoder.encode(few)) if few else 0
    per_byte = tokens / max(1, sum(len(t.encode()) for t in few))
    return Estimate(round(size), round(size * per_byte))


def _head(path: str, domain: Domain) -> tuple[list[str], float]:
    """The first texts of a file, and about how many bytes of the file they take."""
    size = Path(path).stat().st_size
    bad = BadLines(budget=1 << 62)
    texts: list[str] = []
    if layout_of(path).rows == "parquet":
        import pyarrow.parquet

        texts = [document_text(d) for d in islice(read_file(path, domain, bad), 200)]
        rows = pyarrow.parquet.read_metadata(path).num_rows if texts else 1
        return texts, size * len(texts) / max(1, rows)
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder, f"head{''.join(Path(path).suffixes)}")
        with open(path, "rb") as file:
            head.write_bytes(file.read(HEAD))
        try:
            for document in read_file(path if size <= HEAD else str(head), domain, bad):
                texts.append(document_text(document))
        except (
            UserError
        ):  # the head of an archive is a damaged archive; the rest will be read later
            pass
    return texts, min(size, HEAD)
