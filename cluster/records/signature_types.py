"""Convert a version's logged answers to the types of its signature.

The log contains answers of all versions, and values from clients. So a logged value can have any type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from cluster.records.reading import RESERVED_COLUMNS, exact_column
from cluster.runtime import ModelSignature, OutcomeParser, Task
from cluster.runtime.values import value_type


@dataclass(frozen=True, kw_only=True, slots=True)
class TypedRows:
    """Rows of one version, in the types of its signature."""

    rows: pl.DataFrame
    """The logged rows, with each input and answer in its type. A missing value, or a value of another type, is null."""
    names: tuple[str, ...]
    """Names of the columns with inputs and answers."""
    num_invalid: dict[str, int]
    """Maps input to the number of its values that have another type. Inputs without such values are not listed."""


def to_typed_rows(rows: pl.DataFrame, signature: ModelSignature) -> TypedRows:
    """Convert one version's rows, as `cluster.records.read_log` returns them, to the types of its signature."""
    num_invalid_by_input = {}
    columns = _answers(rows, signature)
    for spec in signature.inputs:
        if spec.length is not None or spec.name in RESERVED_COLUMNS:  # a list stays as it was logged
            continue
        column, num_invalid = column_of(spec.name, _values(rows, spec.name), spec.dtype)
        columns.append(column)
        if num_invalid:
            num_invalid_by_input[spec.name] = num_invalid
    names = tuple(column.name for column in columns)
    return TypedRows(rows=rows.with_columns(columns), names=names, num_invalid=num_invalid_by_input)


def column_of(name: str, values: list[Any], dtype: str) -> tuple[pl.Series, int]:
    """Convert logged values to a column of an Arrow type.

    Returns:
        The column, in which values of other types are null, and the number of those values.
    """
    target = value_type(dtype)
    if target is None:
        return exact_column(name, values), 0
    converted, num_invalid = target.convert_or_null(values)
    return pl.Series(name, converted, dtype=_POLARS[target.base], strict=False), num_invalid


_POLARS: dict[type, Any] = {bool: pl.Boolean, str: pl.String, int: pl.Int64, float: pl.Float64}


def _answers(rows: pl.DataFrame, signature: ModelSignature) -> list[pl.Series]:
    if signature.task is Task.regression:
        return [column_of("value", _values(rows, "value"), "double")[0]]
    truths = OutcomeParser(signature)
    labels = [None if value is None else truths.parse(value) for value in _values(rows, "label")]
    label = exact_column("label", labels)
    if signature.task is Task.binary:
        return [label, column_of("probability", _values(rows, "probability"), "double")[0]]
    classes = pl.Struct({str(name): pl.Float64 for name in signature.classes or ()})
    return [label, pl.Series("probabilities", _values(rows, "probabilities"), dtype=classes)]


def _values(rows: pl.DataFrame, name: str) -> list[Any]:
    return rows[name].to_list() if name in rows.columns else [None] * rows.height
