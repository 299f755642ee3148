"""Types of join keys: whole numbers (`int64`) or text (`string`).

An entity may declare the types of its keys. If it does not, the first batch of a view's feature table sets them. Before
the table exists, the first push to the online store sets them. All later writers and readers must use these types.

Whole numbers must be from -(2^63 - 1) to 2^63 - 1, for every writer and reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, SchemaMismatch

MAX_KEY = 2**63 - 1
_DTYPE_OF_CLASS = {int: "int64", str: "string"}
KEY_DTYPES = tuple(_DTYPE_OF_CLASS.values())
RANGE = "-(2^63 - 1) to 2^63 - 1"
"""The range of whole-number keys, for messages."""


def validate_key_types(owner: str, types: Mapping[str, Any]) -> dict[str, str]:
    """Return the declared types of an entity's join keys after validation.

    Raises:
        DefinitionError: A type is neither int64 nor string.
    """
    for key, dtype in types.items():
        if dtype not in KEY_DTYPES:
            raise DefinitionError(
                f"{owner}: join key '{key}' has the type {dtype!r}. Use 'int64' for whole numbers of any width, or "
                "'string'."
            )
    return dict(types)


def key_type_of(value: Any) -> str | None:
    """Return the key type of a value from JSON or Python. Return None if the value cannot be a key."""
    dtype = _DTYPE_OF_CLASS.get(type(value))
    return None if dtype == "int64" and abs(value) > MAX_KEY else dtype


def describe_key_type(dtype: str | None) -> str:
    """Describe a key type for a message. None describes both types."""
    match dtype:
        case "string":
            return "text"
        case "int64":
            return f"a whole number of 64 bits, {RANGE}"
        case _:
            return f"text or a whole number of 64 bits, {RANGE}"


def key_fault(row: Mapping[str, Any], keys: Iterable[str], types: dict[str, str]) -> str | None:
    """Return why a row's join keys are invalid, or None if all are valid.

    Args:
        row: The keys' values by name.
        keys: Names of the join keys.
        types: The stored or declared types. A type that is not known yet is set from this row.
    """
    for key in keys:
        value = row.get(key)
        dtype = key_type_of(value)
        if dtype is None:
            return f"{key} is null" if value is None else f"{key} is no key"
        if types.setdefault(key, dtype) != dtype:
            return f"{key} is no {types[key]}"
    return None


def out_of_range(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return a mask of the keys that are out of range, or None if all are in range.

    The minimum is checked first. Comparing the whole column with a Python number imports pandas, which takes a third of
    the time of a join.
    """
    if not pa.types.is_int64(column.type):
        return None
    least = pc.min_max(column)["min"].as_py()
    if least is None or least >= -MAX_KEY:
        return None
    return pc.fill_null(pc.less(column, -MAX_KEY), False)


def require_stored_types(view: str, given: pa.Schema, stored: Mapping[str, str]) -> None:
    """Require that a batch's join keys have the types that the view's table stores.

    Args:
        view: The view's name, for messages.
        given: The batch's schema.
        stored: Join keys to their stored types.

    Raises:
        SchemaMismatch: A type differs. The message names the key and both types.
    """
    for key, dtype in stored.items():
        source_type = given.field(key).type
        if pa.types.is_int64(source_type) != (dtype == "int64"):
            raise SchemaMismatch(
                f"Join key '{key}' of view '{view}' is stored as {dtype}, the source has {source_type}."
            )


def require_declared_types(view: str, declared: Mapping[str, str], stored: Mapping[str, str]) -> None:
    """Require that a view's table stores its join keys with the declared types.

    Raises:
        DefinitionError: A type differs. The message names the key and both types.
    """
    for key, dtype in declared.items():
        if stored.get(key, dtype) != dtype:
            raise DefinitionError(
                f"View '{view}': join key '{key}' is declared as {dtype}, but its feature table holds {stored[key]}. "
                f"Declare {stored[key]}, or give the view a new name."
            )
