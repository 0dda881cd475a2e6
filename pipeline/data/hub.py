"""Documents of a data set of the hub, or of a folder in its layout.

Where its files are JSON or parquet, they are listed by `datasets` and read by this project's own
readers, so that the same rules hold as for local files. Other kinds are streamed by `datasets`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from pipeline.data.bad_lines import BadLines
from pipeline.data.formats.fields import Fields
from pipeline.data.formats.raw import kind_by_name
from pipeline.data.instruct import Document
from pipeline.errors import UserError
from pipeline.hub_name import from_hub
from pipeline.recipe import Domain


def hub_files(domain: Domain, split: str) -> list[str] | None:
    """The files of a split in their order: paths, or addresses that begin with hf://.

    None where `datasets` has to read them.

    Raises:
        UserError: no such data set, configuration or split.
    """
    import datasets

    try:
        builder = from_hub(
            "hub",
            str(domain.hub),
            lambda: datasets.load_dataset_builder(
                str(domain.hub), domain.hub_config, revision=domain.revision
            ),
        )
    except UserError:
        raise
    except Exception as error:  # many kinds: no such name, config, revision
        raise _not_opened(domain, split, error) from None
    config: Any = builder.config
    files = {str(name): list(paths) for name, paths in (config.data_files or {}).items()}
    options = ("field", "columns", "filters")  # of the data set's card, which change the rows
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if kind not in ("json", "parquet") or any(getattr(config, o, None) for o in options):
        return None
    if split not in files:
        if "[" in split or "+" in split:  # a slice or a sum of splits
            return None
        raise UserError(
            f"data set {domain.hub!r}, split {split!r}, cannot be opened: its splits are "
            f"{', '.join(map(repr, files))}. Set `split`."
        )
    known = all(kind_by_name(path) in ("jsonl", "parquet") for path in files[split])
    return files[split] if known else None


def hub_parts(domain: Domain, split: str) -> int:
    """Into how many parts `datasets` can take a split that it reads: mostly its files."""
    return _opened(domain, split)[0].num_shards


def stream_hub(
    domain: Domain, split: str, bad: BadLines, part: tuple[int, int] = (0, 1)
) -> Iterator[Document]:
    """The documents that `datasets` reads. Columns that are not wanted are never decoded.

    part: (number from 0, of how many); the parts after one another are the whole split.
    """
    fields, where = Fields.of(domain), f"{domain.hub}/{split}"
    rows, columns = _opened(domain, split)
    if part[1] > 1:
        rows = rows.shard(num_shards=part[1], index=part[0])
        where += f", part {part[0] + 1} of {part[1]}"
    if fields.lacks(columns):
        raise fields.missing(f"data set {domain.hub!r}, split {split!r}", columns)
    rows = rows.select_columns([n for n in fields.needed + fields.optional if n in columns])
    iterator, number = iter(rows), 0
    while True:
        try:
            row = next(iterator, None)
        except Exception as error:  # of the network, of a file, of a row that does not fit
            raise UserError(
                f"data set {domain.hub!r}, split {split!r}, cannot be read behind row {number:,} "
                f"({type(error).__name__}: {_reason(error)})"
            ) from None
        if row is None:
            return
        number += 1
        document = fields.take(row, where, number, bad)
        if document is not None:
            yield document


def _opened(domain: Domain, split: str) -> tuple[Any, list[str]]:
    """A split as `datasets.IterableDataset`, and its columns."""
    try:
        return from_hub("hub", str(domain.hub), partial(_open, domain, split))
    except UserError:
        raise
    except Exception as error:
        raise _not_opened(domain, split, error) from None


def _open(domain: Domain, split: str) -> tuple[Any, list[str]]:
    import datasets

    rows = datasets.load_dataset(
        str(domain.hub), domain.hub_config, split=split, revision=domain.revision, streaming=True
    )
    return rows, rows.column_names or list(next(iter(rows), {}))


def _not_opened(domain: Domain, split: str, error: Exception) -> UserError:
    import datasets

    choices: list[str] = []
    if isinstance(error, ValueError):  # no configuration, or one that is not there
        try:
            choices = datasets.get_dataset_config_names(str(domain.hub), revision=domain.revision)
        except Exception:  # then it is not about the configuration
            choices = []
    if choices and domain.hub_config not in choices and (domain.hub_config or len(choices) > 1):
        what = f"has no configuration {domain.hub_config!r}" if domain.hub_config else "has several"
        return UserError(
            f"data set {domain.hub!r} {what}; set `hub_config` to one of: {', '.join(choices)}"
        )
    return UserError(
        f"data set {domain.hub!r}, split {split!r}, cannot be opened ({type(error).__name__}: "
        f"{_reason(error)}). Check `hub`, `hub_config`, `split`, `revision` and the network."
    )


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
