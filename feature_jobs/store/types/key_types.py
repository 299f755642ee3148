"""Types of join keys: whole numbers (`int64`) or text (`string`).

An entity may declare them. Where it does not, a view's feature table decides with its first batch, and before that its
online rows with the first push. Everybody who writes or reads is held to what was declared or decided.

The range is the same for every writer and reader: -(2^63 - 1) to 2^63 - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, SchemaMismatch

MAX_KEY = 2**63 - 1
_OF_PYTHON = {int: "int64", str: "string"}
KEY_DTYPES = tuple(_OF_PYTHON.values())
RANGE = "-(2^63 - 1) to 2^63 - 1"


def declared_types(owner: str, types: Mapping[str, Any]) -> dict[str, str]:
    """The declared types of an entity's join keys.

    Raises:
        DefinitionError: a type that no key has.
    """
    for key, dtype in types.items():
        if dtype not in KEY_DTYPES:
            raise DefinitionError(
                f"{owner}: join key '{key}' has the type {dtype!r}. Give 'int64' for whole numbers of any width, or "
                "'string'."
            )
    return dict(types)


def type_of(value: Any) -> str | None:
    """The type of a key from JSON or Python; None for a value that is no key."""
    dtype = _OF_PYTHON.get(type(value))
    return None if dtype == "int64" and abs(value) > MAX_KEY else dtype


def kind_of(dtype: str | None) -> str:
    """A key's type, for a message."""
    match dtype:
        case "string":
            return "text"
        case "int64":
            return f"a whole number of 64 bits, {RANGE}"
        case _:
            return f"text or a whole number of 64 bits, {RANGE}"


def reason_against(row: Mapping[str, Any], keys: Iterable[str], types: dict[str, str]) -> str | None:
    """Why a row has no key of the wanted types; None where it has.

    Args:
        row: has the keys as plain values.
        keys: join keys.
        types: as they are stored or declared; the row decides those that are not known yet.
    """
    for key in keys:
        value = row.get(key)
        given = type_of(value)
        if given is None:
            return f"{key} is null" if value is None else f"{key} is no key"
        if types.setdefault(key, given) != given:
            return f"{key} is no {types[key]}"
    return None


def beyond_range(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Which keys are beyond the range; None where no key is.

    The least key is looked at first: comparing with a number of Python's imports pandas, which takes a third of a join.
    """
    if not pa.types.is_int64(column.type):
        return None
    least = pc.min_max(column)["min"].as_py()
    if least is None or least >= -MAX_KEY:
        return None
    return pc.fill_null(pc.less(column, -MAX_KEY), False)


def refuse_unlike(view: str, given: pa.Schema, stored: Mapping[str, str]) -> None:
    """Go on only where a batch has the types of keys that the view's table has.

    Raises:
        SchemaMismatch: naming the key and both types.
    """
    for key, dtype in stored.items():
        kind = given.field(key).type
        if pa.types.is_int64(kind) != (dtype == "int64"):
            raise SchemaMismatch(
                f"Join key '{key}' of view '{view}' is stored as {dtype}, the source has {kind}."
            )


def refuse_undeclared(view: str, declared: Mapping[str, str], stored: Mapping[str, str]) -> None:
    """Go on only where a view's table stores its keys as they are declared.

    Raises:
        DefinitionError: naming the key and both types.
    """
    for key, dtype in declared.items():
        if stored.get(key, dtype) != dtype:
            raise DefinitionError(
                f"View '{view}': join key '{key}' is declared as {dtype}, but its feature table holds {stored[key]}. "
                f"Declare {stored[key]}, or give the view a new name."
            )
