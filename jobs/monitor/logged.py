"""Read the answers of each version under each variant, with outcomes, in the types of the version's signature."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.records.location import outcome_log, prediction_log
from cluster.records.matching import MatchedAnswers, match_outcomes
from cluster.records.progress import LogAge, log_age
from cluster.records.reading import INVALID_OUTCOME, OUTCOME, Log, exact_column, iter_outcomes, read_log
from cluster.records.signature_types import TypedRows, to_typed_rows
from cluster.registry import ModelVersion, Registry
from cluster.runtime import OutcomeParser
from cluster.runtime.loader import load_signature
from cluster.security.keys.store import KeyStore
from cluster.storage import layout
from jobs.monitor.config import MonitorConfig

_COLUMNS = ("prediction_id", "row", "as_of", OUTCOME, INVALID_OUTCOME)
"""Columns that monitoring needs in addition to inputs and answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedVersion:
    """Answers of one version under one variant. A variant can have several versions, for example after a promotion."""

    variant: str
    version: ModelVersion
    rows: pl.DataFrame
    """One row for each answered entity. The frame is empty if no request got a score."""
    failed: int
    """Number of rows without a finite score."""
    odd_inputs: dict[str, int]
    """For each input, the number of logged values that do not have the input's type. Such values count as null."""

    @property
    def name(self) -> str:
        """Variant and version as one text for printed output, for example `champion v2`."""
        return f"{self.variant} v{self.version.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedLog:
    """All answers of a model."""

    served: list[ServedVersion]
    """Versions in the order of their first answers."""
    unknown_predictions: int
    """Number of outcomes whose prediction is not in the log."""
    unknown_rows: int
    """Number of outcomes whose prediction is in the log but does not have the row."""
    ages: tuple[LogAge, ...] = ()
    """How complete the logs are."""

    def left_out(self, served: ServedVersion) -> dict[str, int]:
        """By reason, count the rows and values that no figure includes, and the outcomes without a logged answer."""
        odd_outcomes = 0 if served.rows.is_empty() else int(served.rows[INVALID_OUTCOME].sum())
        counts = {
            "rows_without_score": served.failed,
            "odd_outcomes": odd_outcomes,
            "outcomes_of_unknown_predictions": self.unknown_predictions,
            "outcomes_of_unknown_rows": self.unknown_rows,
        }
        return counts | {f"odd_values_of_{name}": count for name, count in served.odd_inputs.items()}


class _VersionKey(NamedTuple):
    """A version under a variant. It equals the tuple that polars uses as the key of a group."""

    variant: str
    number: int


def read_served_log(config: MonitorConfig, ledger: Ledger, store: KeyStore) -> ServedLog:
    """Read a model's logged predictions, with outcomes where they are known.

    Raises:
        RefusedError: The model has no logged prediction.
    """
    places = layout(config.storage)
    registry = Registry(ledger, places)
    predictions = prediction_log(places, ledger, config.name)
    outcomes = outcome_log(places, ledger, config.name)
    ages = (log_age(predictions), log_age(outcomes))
    log = read_log(predictions, store)
    num_failed = _count_failures(log)
    if log.answers.is_empty() and not num_failed:
        raise RefusedError(f"No prediction of '{config.name}' is logged, so there is nothing to monitor.")
    numbers = {key.number for key in num_failed}
    if not log.answers.is_empty():
        numbers |= set(log.answers["version"].to_list())
    versions = {number: registry.get(config.name, number) for number in sorted(numbers)}
    signatures = {number: load_signature(version, store) for number, version in versions.items()}
    matched = MatchedAnswers(answers=log.answers, unknown_predictions=0, unknown_rows=0)
    answers: dict[_VersionKey, pl.DataFrame] = {}
    if not log.answers.is_empty():
        truths = {number: OutcomeParser(signature) for number, signature in signatures.items()}
        matched = match_outcomes(log.answers, iter_outcomes(outcomes, store), truths)
        groups = matched.answers.group_by("variant", "version", maintain_order=True)
        answers = {_VersionKey(*key): rows for key, rows in groups}
    served = []
    for key in dict.fromkeys([*answers, *num_failed]):
        rows, odd_inputs = pl.DataFrame(), dict[str, int]()
        if key in answers:
            typed_answers = to_typed_rows(answers[key], signatures[key.number])
            rows, odd_inputs = _monitored_columns(typed_answers), typed_answers.num_invalid
        served.append(
            ServedVersion(
                variant=key.variant,
                version=versions[key.number],
                rows=rows,
                failed=num_failed[key],
                odd_inputs=odd_inputs,
            )
        )
    return ServedLog(
        served=served,
        unknown_predictions=matched.unknown_predictions,
        unknown_rows=matched.unknown_rows,
        ages=ages,
    )


def _count_failures(log: Log) -> Counter[_VersionKey]:
    if log.failures.is_empty():
        return Counter()
    return Counter(_VersionKey(*row) for row in log.failures.select("variant", "version").iter_rows())


def _monitored_columns(answers: TypedRows) -> pl.DataFrame:
    """Select the columns to monitor. Columns of Python objects are dropped, because such a frame cannot be stored.

    Outcome and label are never dropped. If the values of one have several types, they are converted to text.
    """
    rows = answers.rows.with_columns(
        _text_if_mixed(exact_column(name, answers.rows[name].to_list()))
        for name in (OUTCOME, "label")
        if name in answers.rows.columns
    )
    return rows.select(name for name in (*_COLUMNS, *answers.names) if rows[name].dtype != pl.Object)


def _text_if_mixed(column: pl.Series) -> pl.Series:
    if column.dtype != pl.Object:
        return column
    return pl.Series(column.name, [None if value is None else str(value) for value in column.to_list()])
