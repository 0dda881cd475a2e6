"""Rows of a parquet file, of which only the wanted columns are read."""

from collections.abc import Iterator
from typing import Any

from pipeline.data.bad_lines import BadLines
from pipeline.data.formats.fields import Fields
from pipeline.data.formats.raw import open_file
from pipeline.data.instruct import Document
from pipeline.errors import UserError


def read_parquet(path: str, fields: Fields, bad: BadLines) -> Iterator[Document]:
    """The documents of a file. Text may be strings or bytes; what is not UTF-8 costs its row.

    Raises:
        UserError: a column is not there, or less than half of the rows can be read.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open_file(path) as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged parquet file: {_reason(error)}") from None
        names, total = file.schema_arrow.names, file.metadata.num_rows
        if fields.lacks(names):
            raise fields.missing(path, names)
        columns = [n for n in fields.needed + fields.optional if n in names]
        try:
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                values = [_values(batch.column(name)) for name in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    named = dict(zip(columns, row, strict=True))
                    document = fields.take(named, path, number, bad)
                    if document is not None:
                        yield document
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"damaged parquet file: {_reason(error)}"
            if number < total / 2:
                raise UserError(
                    f"{path}: only {number:,} of its {total:,} rows can be read ({reason}); mend "
                    "or fetch it again"
                ) from None
            bad.lose(path, number + 1, reason)


def _values(column: Any) -> list[Any]:
    """Python values; text as str, or as bytes where it is not UTF-8.

    Arrow's own conversion of a string column stops at the first row that is not UTF-8.
    """
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if text:
        column = column.cast(pyarrow.large_binary())
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # text within a list or struct: one row costs itself
        values = [_value(scalar) for scalar in column]
    return [_decoded(v) if isinstance(v, bytes) else v for v in values]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return bytes(error.object)


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
