"""A version's logged answers in the types of its signature, whatever other versions and clients wrote beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from cluster.runtime import ModelSignature, Task, Truths
from cluster.runtime.values import value_type


@dataclass(frozen=True, kw_only=True, slots=True)
class Typed:
    """Rows of one version."""

    rows: pl.DataFrame
    """As they were, with each input and answer in its own type; null where a value is none of that type."""
    absent: tuple[str, ...]
    """Inputs that no record has; they are null."""
    odd: dict[str, int]
    """Input to the number of its values that are not of its type."""


def typed(rows: pl.DataFrame, signature: ModelSignature) -> Typed:
    """One version's rows, as `cluster.records.read_log` gives them."""
    absent, odd = [], {}
    columns = _answers(rows, signature)
    for spec in signature.inputs:
        if spec.name not in rows.columns:
            absent.append(spec.name)
        values = rows[spec.name].to_list() if spec.name in rows.columns else [None] * rows.height
        column, wrong = column_of(spec.name, values, spec.dtype)
        columns.append(column)
        if wrong:
            odd[spec.name] = wrong
    return Typed(rows=rows.with_columns(columns), absent=tuple(absent), odd=odd)


def column_of(name: str, values: Sequence[Any], dtype: str) -> tuple[pl.Series, int]:
    """Logged values as a column of an Arrow type, and how many are not of it and are null in the column."""
    kind = value_type(dtype)
    if kind is None:
        return pl.Series(name, values, dtype=pl.Object), 0
    fitted, wrong = kind.fit_what_fits(values)
    return pl.Series(name, fitted, dtype=_POLARS[kind.base], strict=False), wrong


_POLARS: dict[type, Any] = {bool: pl.Boolean, str: pl.String, int: pl.Int64, float: pl.Float64}


def _answers(rows: pl.DataFrame, signature: ModelSignature) -> list[pl.Series]:
    match signature.task:
        case Task.regression:
            names = ["value"]
        case Task.binary:
            names = ["probability"]
        case Task.multiclass:
            names = []
    columns = [column_of(name, rows[name].to_list(), "double")[0] for name in names]
    if signature.classes is not None:
        truths = Truths(signature)
        labels = [None if value is None else truths.of(value) for value in rows["label"].to_list()]
        columns.append(pl.Series("label", labels, dtype=pl.Object))
    return columns
