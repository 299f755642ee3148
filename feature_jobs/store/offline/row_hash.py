"""Hash the content of a table with SHA-256. The hash does not depend on the library that made the table.

The hash covers the columns' names and logical types and, in order, the validity and the values of each column. It
ignores chunks, dictionaries, the width of offsets, the bytes behind a null, and the bit pattern of a NaN.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.types.columns import to_numpy


class Columns(Protocol):
    """Named columns: a table, or a file that is read column by column."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types, without the columns' data."""
        ...

    @property
    def num_rows(self) -> int: ...

    def __getitem__(self, name: str, /) -> pa.ChunkedArray: ...


def row_hash(table: pa.Table | Columns) -> str:
    """Return the SHA-256, in hex, of names, types, validity and values. One column is in memory at a time."""
    return _hash(table, lists_as_text=False)


def has_row_hash(table: pa.Table | Columns, expected: str) -> bool:
    """Return whether a table has this hash. A hash of an earlier release, which hashed lists as text, matches too."""
    if row_hash(table) == expected:
        return True
    return any(map(_is_list, table.schema.types)) and _hash(table, lists_as_text=True) == expected


def _hash(table: pa.Table | Columns, *, lists_as_text: bool) -> str:
    types = [_plain_type(field.type) for field in table.schema]
    names = [str(dtype) if lists_as_text else _type_name(dtype) for dtype in types]
    header = [table.num_rows, *zip(table.schema.names, names, strict=True)]
    digest = hashlib.sha256(json.dumps(header).encode())
    for name in table.schema.names:
        column = _plain(table[name])
        valid = to_numpy(column.is_valid())
        digest.update(np.packbits(valid).tobytes())
        for part in (
            _list_bytes(column) if _is_list(column.type) and not lists_as_text else _value_bytes(column)
        ):
            digest.update(part)
    return digest.hexdigest()


def _plain_type(dtype: pa.DataType) -> pa.DataType:
    """Return the type of a dictionary's values, and one type for all text."""
    plain = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return pa.string() if pa.types.is_large_string(plain) or pa.types.is_string_view(plain) else plain


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decode a dictionary, and give text one type."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    plain = _plain_type(column.type)
    return column if column.type == plain else column.cast(plain)


def _is_list(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
    )


def _type_name(dtype: pa.DataType) -> str:
    """Return the name of a type. A list is named by its element type, without field name and offset width."""
    if not _is_list(dtype):
        return str(dtype)
    is_text = pa.types.is_large_string(dtype.value_type) or pa.types.is_string_view(dtype.value_type)
    return f"list<{'string' if is_text else _type_name(dtype.value_type)}>"


def _list_bytes(column: pa.ChunkedArray) -> Iterator[bytes | memoryview]:
    """Yield the lengths of lists, then their elements as a column."""
    yield to_numpy(pc.list_value_length(column)).astype("<i8").tobytes()
    elements = _plain(pc.list_flatten(column))
    yield np.packbits(to_numpy(elements.is_valid())).tobytes()
    yield from _list_bytes(elements) if _is_list(elements.type) else _value_bytes(elements)


def _value_bytes(column: pa.ChunkedArray) -> list[bytes | memoryview]:
    dtype = column.type
    if pa.types.is_boolean(dtype):
        return [np.packbits(to_numpy(column, null=False)).tobytes()]
    if pa.types.is_floating(dtype):
        numbers = to_numpy(column)
        return [np.where(np.isnan(numbers), np.array(np.nan, numbers.dtype), numbers).tobytes()]
    if pa.types.is_integer(dtype):
        return [to_numpy(column).tobytes()]
    if pa.types.is_timestamp(dtype) or pa.types.is_date64(dtype):
        return [to_numpy(column.cast(pa.int64())).tobytes()]
    if not pa.types.is_string(dtype):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        column = pa.chunked_array([texts], pa.string())
    lengths = to_numpy(pc.binary_length(column)).astype("<i8").tobytes()
    return [lengths, *(_text_bytes(chunk) for chunk in column.drop_null().chunks if len(chunk))]


def _text_bytes(text: pa.StringArray) -> memoryview:
    """Return the bytes of all texts of an array, one after another, as a view of its buffer. It must have no nulls."""
    _, offsets, data = text.buffers()
    begins = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1]
    return memoryview(data)[begins[0] : begins[-1]] if data is not None else memoryview(b"")
