"""The bytes of a file: what they are, decompressed, in UTF-8, and in lines.

Bytes count before names: a gzip archive is one whatever its name. What is no text at all (a pointer
of Git LFS, an HTML page where rows should be, another archive) is an error that says so.
"""

import codecs
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

from pipeline.data.bad_lines import BadLines
from pipeline.errors import UserError
from pipeline.network import RemoteFile

Rows = Literal["jsonl", "text", "parquet"]
KINDS: dict[str, Rows] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
SUFFIXES = tuple(
    f"{kind}{archive}"
    for kind in KINDS
    for archive in (("",) if kind == ".parquet" else ("", ".gz", ".zst"))
)
# An archive that gives more than BOMB bytes, and BOMB_RATIO times what was read of it, is no text.
BOMB, BOMB_RATIO = 1 << 28, 200
LONGEST_LINE = 1 << 28  # bytes; a longer one is no row
HEAD = 4096  # bytes that tell what a file is
LONGEST_WINDOW = 1 << 31  # bytes; `zstd --long=31` is the longest there is
LFS = b"version https://git-lfs.github.com/spec/"
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"%PDF": "a PDF document",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
}
# The marks of UTF-32 begin like those of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Damage(Exception):
    """The rest of a file cannot be read."""


@dataclass(frozen=True)
class Layout:
    """What a file holds. array: its rows are one JSON array, not one object a line."""

    rows: Rows
    compression: Literal["gzip", "zstd"] | None = None
    encoding: str | None = None  # other than UTF-8, said by a byte order mark
    array: bool = False


def suffix_of(path: str) -> str:
    """The known suffixes that a name ends with, in small letters; empty where there are none."""
    return next((s for s in SUFFIXES if path.lower().endswith(s)), "")


def kind_by_name(path: str) -> Rows | None:
    """What the last suffixes of a name say, None if they say nothing."""
    suffix = suffix_of(path)
    return KINDS["." + suffix.split(".")[1]] if suffix else None


def layout_of(path: str) -> Layout:
    """Look at the first bytes of a file.

    Raises:
        UserError: it cannot be opened, or holds no rows (the message says what it holds).
    """
    named = kind_by_name(path)
    with open_file(path) as file:
        head = file.read(HEAD)
    if head.startswith(PARQUET):
        return Layout("parquet")
    compression: Literal["gzip", "zstd"] | None = None
    if head.startswith((GZIP, ZSTD)):
        compression = "gzip" if head.startswith(GZIP) else "zstd"
        head = _first_piece(path, compression)
    if head.startswith(LFS):
        raise UserError(
            f"{path}: a pointer of Git LFS, not the data itself; fetch it with `git lfs pull`"
        )
    foreign = next((what for magic, what in FOREIGN.items() if head.startswith(magic)), None)
    if foreign:
        raise UserError(f"{path}: {foreign}; known are {', '.join(SUFFIXES)}")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if encoding is None and head[:1000].count(0) > len(head[:1000]) / 5:
        what = "binary data" if named == "parquet" else "text in UTF-16 or UTF-32 without a mark"
        raise UserError(
            f"{path}: more than every fifth byte is NUL, as in {what}; convert it to UTF-8"
        )
    text = _beginning(head, encoding)
    if text.lower().startswith(("<!doctype html", "<html")):
        raise UserError(
            f"{path}: an HTML page, perhaps an error that a download ended with; fetch it again "
            "(documents that are HTML can be rows of a .jsonl file)"
        )
    if named == "parquet":
        raise UserError(f"{path}: not parquet: it does not begin with PAR1 but {head[:8]!r}")
    rows = named or "jsonl"
    return Layout(rows, compression, encoding, rows == "jsonl" and _begins_array(text))


def _first_piece(path: str, compression: Literal["gzip", "zstd"]) -> bytes:
    """Of the content of an archive; nothing where it is damaged, which reading it will say."""
    head = b""
    try:
        for piece in chunks(path, Layout("text", compression)):
            head += piece
            if len(head) >= HEAD:
                break
    except Damage:
        pass
    return head[:HEAD]


def _beginning(head: bytes, encoding: str | None) -> str:
    text = head.decode(encoding or "utf-8-sig", errors="ignore")
    return text.lstrip()


def _begins_array(text: str) -> bool:
    """Whether rows follow in one array: `[` and then no complete value that is something else."""
    if not text.startswith("["):
        return False
    try:
        value = json.loads(text.splitlines()[0])
    except ValueError:
        return True
    return not value or any(isinstance(row, dict) for row in value)


def open_file(path: str) -> BinaryIO:
    """A local file, or one behind an address that fsspec knows (hf://...). Raises UserError."""
    try:
        if "://" in path:
            return cast(BinaryIO, io.BufferedReader(RemoteFile(path), 1 << 20))
        return open(path, "rb")
    except Exception as error:  # OSError, and those of the file systems
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be opened: {reason}") from None


def chunks(path: str, layout: Layout) -> Iterator[bytes]:
    """Decompressed pieces of a file, in UTF-8 without a byte order mark.

    Raises:
        Damage: behind the last good piece.
        UserError: less than half of the file can be read.
    """
    with open_file(path) as file:
        pieces = _decompressed(file, layout.compression)
        if layout.encoding:
            pieces = _recoded(pieces, layout.encoding)
        first = layout.encoding is None
        try:
            for piece in pieces:
                yield piece.removeprefix(codecs.BOM_UTF8) if first else piece
                first = first and not piece
        except (OSError, Damage) as error:
            reason = getattr(error, "strerror", None) or str(error)
            share = file.tell() / max(1, file.seek(0, 2))
            if share < 0.5:
                raise UserError(
                    f"{path}: only the first {share:.0%} of it can be read ({reason}); mend or "
                    "fetch it again"
                ) from None
            raise Damage(reason) from None


def _decompressed(file: BinaryIO, compression: str | None) -> Iterator[bytes]:
    """Pieces of a few MB at most, however much an archive holds.

    Raises:
        Damage: the archive is damaged, or ends too early.
        UserError: it is a bomb.
    """
    if compression is None:
        while chunk := file.read(1 << 20):
            yield chunk
        return
    took = gave = 0
    for piece, consumed in (_gunzipped if compression == "gzip" else _unzstd)(file):
        took, gave = took + consumed, gave + len(piece)
        if gave > BOMB and gave > BOMB_RATIO * took:
            raise UserError(
                f"{getattr(file, 'name', 'an archive')}: {took:,} bytes of it unpack to "
                f"{gave:,}: no text is so uniform; not read further"
            )
        yield piece


def _gunzipped(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """(a piece of the content, how many bytes of the archive were taken for it)."""
    decoder: Any = None
    while chunk := file.read(1 << 16):
        while chunk:  # an archive may hold several members
            if decoder is None or decoder.eof:
                if not chunk.strip(b"\0"):  # padding, as gzip allows behind the last one
                    break
                decoder = zlib.decompressobj(wbits=31)
            try:
                piece = decoder.decompress(chunk, 1 << 20)
            except zlib.error as error:
                raise Damage(f"damaged archive: {error}") from None
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            yield piece, len(chunk) - len(rest)
            chunk = rest
    if decoder is not None and not decoder.eof:
        raise Damage("truncated archive")


def _unzstd(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """As `_gunzipped`; the library has no bound but what it is given, so it is given little."""
    import zstandard

    new = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj
    decoder: Any = None
    while chunk := file.read(1 << 12):
        while chunk:  # several frames
            if decoder is None or decoder.eof:
                if not chunk.strip(b"\0"):
                    break
                decoder = new()
            try:
                piece = decoder.decompress(chunk)
            except zstandard.ZstdError as error:
                raise Damage(f"damaged archive: {error}") from None
            rest = decoder.unused_data if decoder.eof else b""
            yield piece, len(chunk) - len(rest)
            chunk = rest
    if decoder is not None and not decoder.eof:
        raise Damage("truncated archive")


def _recoded(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """To UTF-8. A lone surrogate stays one, so that it costs its row and not the file."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for piece in pieces:
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise Damage(f"not {encoding.upper()}: {error.reason}") from None


def lines(path: str, layout: Layout, bad: BadLines) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; what stands behind damage is given up and counted as one bad line."""
    number, rest, waiting = 0, [b""], 0
    try:
        for chunk in chunks(path, layout):
            *complete, tail = chunk.split(b"\n")
            if complete:
                complete[0] = b"".join(rest) + complete[0]
                rest = []
            rest.append(tail)  # a list, so that one long line costs linear time
            waiting = len(tail) if complete else waiting + len(tail)
            if waiting > LONGEST_LINE:
                raise UserError(
                    f"{path}:{number + len(complete) + 1}: a line of more than {waiting:,} bytes "
                    "is no row; split it"
                )
            for line in complete:
                number += 1
                yield number, line
    except Damage as error:
        bad.lose(path, number + 1, str(error))
    else:
        if last := b"".join(rest):
            yield number + 1, last
