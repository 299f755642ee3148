"""What each version answered under each variant, with what came true, in the types of its signature."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import polars as pl

from cluster.errors import RefusedError
from cluster.records import Matched, Typed, all_outcomes, match, read_log, typed
from cluster.records.reading import ODD, OUTCOME, exact_column
from cluster.registry import ModelVersion, Registry
from cluster.runtime import Truths
from cluster.runtime.loader import load_signature
from cluster.security.keys.store import KeyStore
from cluster.storage import layout, local
from jobs.monitor.config import MonitorConfig

_KEPT = ("prediction_id", "row", "as_of", OUTCOME, ODD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One version's answers under one variant; after a promotion, a variant has had several versions."""

    variant: str
    version: ModelVersion
    rows: pl.DataFrame
    """Empty where it has only failed."""
    failed: int
    """Rows that it gave no finite score for."""
    odd_inputs: dict[str, int]
    """Input to the number of logged values that are not of its type; they count as null."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant} v{self.version.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """All of a model."""

    served: list[Served]
    """In the order of their first answers."""
    unknown_predictions: int
    unknown_rows: int

    def left_out(self, served: Served) -> dict[str, int]:
        """What is in no figure, by why: of this version, and outcomes that belong to no version."""
        odd = 0 if served.rows.is_empty() else int(served.rows[ODD].sum())
        counts = {
            "rows_without_score": served.failed,
            "odd_outcomes": odd,
            "outcomes_of_unknown_predictions": self.unknown_predictions,
            "outcomes_of_unknown_rows": self.unknown_rows,
        }
        return counts | {f"odd_values_of_{name}": count for name, count in served.odd_inputs.items()}


def read(config: MonitorConfig, registry: Registry, store: KeyStore) -> Logged:
    """Predictions with their outcomes where known.

    Raises:
        RefusedError: nothing was predicted yet.
    """
    places = layout(config.storage)
    log = read_log(local(places.predictions(config.name)), store)
    failed = Counter(() if log.failures.is_empty() else log.failures.select("variant", "version").rows())
    if log.answers.is_empty() and not failed:
        raise RefusedError(f"No prediction of '{config.name}' is logged: no data, so no statement.")
    numbers = {number for _, number in failed}
    if not log.answers.is_empty():
        numbers |= set(log.answers["version"].to_list())
    versions = {number: registry.get(config.name, number) for number in sorted(numbers)}
    signatures = {number: load_signature(version, store) for number, version in versions.items()}
    matched = Matched(answers=log.answers, unknown_predictions=0, unknown_rows=0)
    groups: dict[tuple[Any, ...], pl.DataFrame] = {}
    if not log.answers.is_empty():
        outcomes = all_outcomes(local(places.outcomes(config.name)), store)
        matched = match(log.answers, outcomes, {number: Truths(one) for number, one in signatures.items()})
        groups = dict(matched.answers.group_by("variant", "version", maintain_order=True))
    served = []
    for key in dict.fromkeys([*groups, *failed]):
        variant, number = key
        rows, odd = pl.DataFrame(), dict[str, int]()
        if key in groups:
            mine = typed(groups[key], signatures[number])
            rows, odd = _storable(mine), mine.odd
        served.append(
            Served(variant=variant, version=versions[number], rows=rows, failed=failed[key], odd_inputs=odd)
        )
    return Logged(
        served=served,
        unknown_predictions=matched.unknown_predictions,
        unknown_rows=matched.unknown_rows,
    )


def _storable(mine: Typed) -> pl.DataFrame:
    """The columns that are measured, without those of a type that no frame stores.

    Outcome and label are always among them. Where their values are of several types they are texts, which mean the
    same.
    """
    rows = mine.rows.with_columns(
        _texts_if_mixed(exact_column(name, mine.rows[name].to_list()))
        for name in (OUTCOME, "label")
        if name in mine.rows.columns
    )
    return rows.select(name for name in (*_KEPT, *mine.names) if rows[name].dtype != pl.Object)


def _texts_if_mixed(column: pl.Series) -> pl.Series:
    if column.dtype != pl.Object:
        return column
    return pl.Series(column.name, [None if value is None else str(value) for value in column.to_list()])
