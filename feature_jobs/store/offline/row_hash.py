"""A table's content as one SHA-256 that does not depend on the library that holds it.

Hashed are the columns' names and logical types and, in order, each column's validity and values. Chunks, dictionaries,
offsets' width and what lies under a null do not count; nor does which NaN a NaN is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.types.columns import numpy_of


def row_hash(table: pa.Table) -> str:
    """The SHA-256, in hex, over names, types, validity and values."""
    return _hash(table, lists_as_text=False)


def has_row_hash(table: pa.Table, expected: str) -> bool:
    """Whether a table has this hash, also where an earlier release made it, which hashed lists as text."""
    if row_hash(table) == expected:
        return True
    return any(map(_is_list, table.schema.types)) and _hash(table, lists_as_text=True) == expected


def _hash(table: pa.Table, *, lists_as_text: bool) -> str:
    columns = [_plain(table[name]) for name in table.column_names]
    types = [str(column.type) if lists_as_text else _name(column.type) for column in columns]
    header = [table.num_rows, *zip(table.column_names, types, strict=True)]
    digest = hashlib.sha256(json.dumps(header).encode())
    for column in columns:
        valid = numpy_of(column.is_valid())
        digest.update(np.packbits(valid).tobytes())
        for part in _lists(column) if _is_list(column.type) and not lists_as_text else _values(column):
            digest.update(part)
    return digest.hexdigest()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionaries, and with one type for text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    return column


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _name(kind: pa.DataType) -> str:
    """Of a list, what its elements are; neither their name nor the offsets' width."""
    if not _is_list(kind):
        return str(kind)
    element = pa.types.is_large_string(kind.value_type) or pa.types.is_string_view(kind.value_type)
    return f"list<{'string' if element else _name(kind.value_type)}>"


def _lists(column: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """Lengths, then the elements as a column."""
    yield numpy_of(pc.list_value_length(column)).astype("<i8").tobytes()
    elements = _plain(pc.list_flatten(column))
    yield np.packbits(numpy_of(elements.is_valid())).tobytes()
    yield from _lists(elements) if _is_list(elements.type) else _values(elements)


def _values(column: pa.ChunkedArray) -> list[bytes | memoryview]:
    kind = column.type
    if pa.types.is_boolean(kind):
        return [np.packbits(numpy_of(column, null=False)).tobytes()]
    if pa.types.is_floating(kind):
        numbers = numpy_of(column)
        return [np.where(np.isnan(numbers), np.array(np.nan, numbers.dtype), numbers).tobytes()]
    if pa.types.is_integer(kind):
        return [numpy_of(column).tobytes()]
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        return [numpy_of(column.cast(pa.int64())).tobytes()]
    if not pa.types.is_string(kind):
        column = pa.chunked_array(
            [[None if one is None else str(one) for one in column.to_pylist()]], pa.string()
        )
    lengths = numpy_of(pc.binary_length(column)).astype("<i8").tobytes()
    return [lengths, *(_bytes(chunk) for chunk in column.drop_null().chunks if len(chunk))]


def _bytes(text: pa.StringArray) -> memoryview:
    """The texts of an array without nulls, one after the other, where they lie."""
    _, offsets, data = text.buffers()
    begins = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    return memoryview(data)[begins[0] : begins[-1]] if data is not None else memoryview(b"")
