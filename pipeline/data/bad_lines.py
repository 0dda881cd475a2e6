"""What a reader could not use: broken rows, rows without text, files that break off."""

from dataclasses import dataclass, field

from pipeline.errors import UserError

EXAMPLES = 20  # bad lines that are remembered one by one


@dataclass
class BadLines:
    """Rows that were skipped, each counted once however often its file is read.

    `examples` holds the first 20 as (file, line from 1, reason). More than `budget` of them raise
    UserError. `damaged` holds the places (also in `examples`) behind which a part of a file is
    lost. `blank` counts the rows without any text, which are harmless and use up no budget.
    """

    budget: int = 100
    count: int = 0
    examples: list[tuple[str, int, str]] = field(default_factory=list)
    damaged: list[tuple[str, int, str]] = field(default_factory=list)
    blank: int = 0
    _seen: set[tuple[str, int]] = field(default_factory=set, repr=False)
    _read: dict[str, int] = field(default_factory=dict, repr=False)  # blank rows, up to this line

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

    def add_blank(self, file: str, line: int) -> None:
        """Count one row without text; a file's rows come in their order."""
        if line > self._read.get(file, 0):
            self._read[file] = line
            self.blank += 1

    def lose(self, file: str, line: int, reason: str) -> None:
        """The part of a file from this line on cannot be read."""
        if (file, line) not in self._seen:
            self.damaged.append((file, line, reason))
        self.add(file, line, reason)

    def listing(self, count: int = 5) -> str:
        """The first examples, one `file:line: reason` per line."""
        return "\n".join(f"  {f}:{n}: {reason}" for f, n, reason in self.examples[:count])

    def describe(self) -> str:
        """One line for people, empty where everything was read."""
        said = [
            f"{self.count:,} broken rows left out" if self.count else "",
            f"{self.blank:,} rows without text" if self.blank else "",
            *(f"{f} cannot be read from row {n} on ({reason})" for f, n, reason in self.damaged),
        ]
        return "; ".join(filter(None, said))
