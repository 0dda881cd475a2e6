"""Plain text: documents separated by blank lines, or one a line."""

import itertools
from collections.abc import Iterator

from pipeline.data.bad_lines import BadLines
from pipeline.data.formats.fields import problem
from pipeline.data.formats.raw import Layout, lines


def read_text(path: str, layout: Layout, bad: BadLines, by_line: bool) -> Iterator[str]:
    """The documents of a file."""
    block: list[bytes] = []
    first = 1
    # a blank line behind the last one closes the last block
    for number, line in itertools.chain(lines(path, layout, bad), [(0, b"")]):
        if line.strip():
            if not block:
                first = number
            block.append(line)
        if block and (by_line or not line.strip()):
            try:
                text = b"\n".join(block).decode().replace("\r\n", "\n").rstrip("\r")
                reason = problem(text)
            except UnicodeDecodeError:
                text, reason = "", "is not UTF-8"
            if reason:
                bad.add(path, first, f"the text {reason}")
            elif text.strip():
                yield text
            block = []
