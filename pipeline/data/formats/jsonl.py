"""Rows of JSON: one object a line, or one array of objects."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.data.bad_lines import BadLines
from pipeline.data.formats.fields import Fields
from pipeline.data.formats.raw import Damage, Layout, chunks, lines
from pipeline.data.instruct import Document
from pipeline.errors import UserError

LARGEST = 1 << 26  # characters of one element of an array; a larger one is taken to be broken
GAP = re.compile(r"[\s,]*")


def read_jsonl(path: str, layout: Layout, fields: Fields, bad: BadLines) -> Iterator[Document]:
    """The documents of a file; raises UserError where no row has the fields."""
    found = False
    seen: set[str] = set()
    names: set[str] = set()  # of the rows that were found, until they have all optional ones
    for number, row in (_elements if layout.array else _objects)(path, layout, bad):
        if not isinstance(row, dict):
            bad.add(path, number, f"not a JSON object but {type(row).__name__}")
            continue
        missing = [name for name in fields.needed if name not in row]
        if missing:
            seen |= row.keys()
            if not found and bad.count >= bad.budget:  # the likelier mistake is the field's name
                raise fields.missing(path, seen)
            bad.add(path, number, f"no field {missing[0]!r}")
            continue
        found = True
        if not names.issuperset(fields.optional):
            names |= row.keys()
        document = fields.take(row, path, number, bad)
        if document is not None:
            yield document
    if seen and not found:
        raise fields.missing(path, seen)
    if names and fields.lacks(names):
        raise fields.missing(path, names)


def _objects(path: str, layout: Layout, bad: BadLines) -> Iterator[tuple[int, Any]]:
    """(line, its value)."""
    for number, line in lines(path, layout, bad):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.add(path, number, f"not JSON: {error}")
            continue
        yield number, row


def _elements(path: str, layout: Layout, bad: BadLines) -> Iterator[tuple[int, Any]]:
    """(number from 1, element of the array), in the memory of one element."""
    decoder = json.JSONDecoder()
    utf8 = codecs.getincrementaldecoder("utf-8")()
    buffer, at, number = "", 0, 1
    try:
        for chunk in chunks(path, layout):
            buffer, at = buffer[at:] + utf8.decode(chunk), 0
            if number == 1:
                buffer = buffer.lstrip().removeprefix("[")
            while (at := GAP.match(buffer, at).end()) < len(buffer):  # type: ignore[union-attr]
                if buffer[at] == "]":
                    return
                try:
                    value, at = decoder.raw_decode(buffer, at)
                except ValueError as error:
                    if len(buffer) - at > LARGEST:
                        raise _broken(path, number, str(error)) from None
                    break  # the rest of the element is in the next piece
                yield number, value
                number += 1
    except Damage as error:
        bad.lose(path, number, str(error))
        return
    except (UnicodeDecodeError, RecursionError) as error:
        raise _broken(path, number, str(error)) from None
    raise _broken(path, number, "the file ends within the array")


def _broken(path: str, number: int, reason: str) -> UserError:
    return UserError(
        f"{path}: a JSON array that cannot be read from its element {number} on ({reason}); mend "
        "it, or write one object per line"
    )
