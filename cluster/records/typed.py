"""A version's logged answers in the types of its signature, whatever other versions and clients wrote beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from cluster.records.reading import TAKEN, exact_column
from cluster.runtime import ModelSignature, Task, Truths
from cluster.runtime.values import value_type


@dataclass(frozen=True, kw_only=True, slots=True)
class Typed:
    """Rows of one version."""

    rows: pl.DataFrame
    """As they were, with each input and answer in its own type; null where a value is none of that type, or absent."""
    names: tuple[str, ...]
    """Of the inputs and answers among its columns."""
    odd: dict[str, int]
    """Input to the number of its values that are not of its type."""


def typed(rows: pl.DataFrame, signature: ModelSignature) -> Typed:
    """One version's rows, as `cluster.records.read_log` gives them."""
    odd = {}
    columns = _answers(rows, signature)
    for spec in signature.inputs:
        if spec.length is not None or spec.name in TAKEN:  # a list stays as it was logged
            continue
        column, wrong = column_of(spec.name, _values(rows, spec.name), spec.dtype)
        columns.append(column)
        if wrong:
            odd[spec.name] = wrong
    return Typed(rows=rows.with_columns(columns), names=tuple(one.name for one in columns), odd=odd)


def column_of(name: str, values: list[Any], dtype: str) -> tuple[pl.Series, int]:
    """Logged values as a column of an Arrow type, and how many are not of it and are null in the column."""
    kind = value_type(dtype)
    if kind is None:
        return exact_column(name, values), 0
    fitted, wrong = kind.fit_what_fits(values)
    return pl.Series(name, fitted, dtype=_POLARS[kind.base], strict=False), wrong


_POLARS: dict[type, Any] = {bool: pl.Boolean, str: pl.String, int: pl.Int64, float: pl.Float64}


def _answers(rows: pl.DataFrame, signature: ModelSignature) -> list[pl.Series]:
    if signature.task is Task.regression:
        return [column_of("value", _values(rows, "value"), "double")[0]]
    truths = Truths(signature)
    labels = [None if value is None else truths.of(value) for value in _values(rows, "label")]
    label = exact_column("label", labels)
    if signature.task is Task.binary:
        return [label, column_of("probability", _values(rows, "probability"), "double")[0]]
    classes = pl.Struct({str(name): pl.Float64 for name in signature.classes or ()})
    return [label, pl.Series("probabilities", _values(rows, "probabilities"), dtype=classes)]


def _values(rows: pl.DataFrame, name: str) -> list[Any]:
    return rows[name].to_list() if name in rows.columns else [None] * rows.height
