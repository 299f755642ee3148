"""Arrow types of training set columns."""

from __future__ import annotations

import pyarrow as pa


def value_type(column: pa.ChunkedArray) -> pa.DataType:
    """Return the type of a column's values. For a dictionary-encoded column, it is the type of the decoded values."""
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type


def without_string_views(table: pa.Table) -> pa.Table:
    """Return the table with `string_view` columns as `string`. Several Arrow functions do not support `string_view`."""
    fields = [
        field.with_type(pa.string()) if pa.types.is_string_view(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields, metadata=table.schema.metadata))


def is_text(dtype: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's string types."""
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
    )
