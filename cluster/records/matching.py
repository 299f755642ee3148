"""Join logged answers with their outcomes, and count the outcomes that match no answer.

A client with permission to send outcomes can send wrong ones: for an answer that does not exist, for a row that the
answer does not have, or with a value that the model cannot predict. Such outcomes are counted, but not used in any
figure. An invalid outcome does not replace an earlier valid outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from cluster.records.reading import INVALID_OUTCOME, OUTCOME, Outcome, exact_column
from cluster.runtime import OutcomeParser


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedAnswers:
    """Answers with their outcomes."""

    answers: pl.DataFrame
    """Answers of the requested versions, with two more columns: `outcome` (class or number, null if unknown) and
    `odd_outcome` (whether the last received outcome is invalid for the model)."""
    unknown_predictions: int
    """Number of outcomes whose answer is not in the log."""
    unknown_rows: int
    """Number of outcomes whose answer is in the log, but does not have the row."""


def match_outcomes(
    answers: pl.DataFrame, outcomes: Iterable[Outcome], truths: Mapping[int, OutcomeParser]
) -> MatchedAnswers:
    """Assign each answered row its last valid outcome.

    Args:
        answers: All answers of a model's log, of all versions.
        outcomes: Outcomes in the order in which they were received.
        truths: Parsers of outcomes, by version. Only answers of these versions are returned.
    """
    key_columns = ("prediction_id", "row")
    versions = dict(zip(answers.select(key_columns).rows(), answers["version"].to_list(), strict=True))
    logged = {prediction_id for prediction_id, _ in versions}
    valid: dict[tuple[str, int], Any] = {}
    last_is_invalid: dict[tuple[str, int], bool] = {}
    unknown_predictions: set[tuple[str, int]] = set()
    unknown_rows: set[tuple[str, int]] = set()
    for prediction_id, row, value in outcomes:
        key = (prediction_id, row)
        if key not in versions:
            (unknown_rows if prediction_id in logged else unknown_predictions).add(key)
        elif (version_truths := truths.get(versions[key])) is not None:
            outcome = version_truths.parse(value)
            last_is_invalid[key] = outcome is None
            if outcome is not None:
                valid[key] = outcome
    requested = answers.filter(pl.col("version").is_in(list(truths)))
    keys = requested.select(key_columns).rows()
    return MatchedAnswers(
        answers=requested.with_columns(
            exact_column(OUTCOME, [valid.get(key) for key in keys]),
            pl.Series(INVALID_OUTCOME, [last_is_invalid.get(key, False) for key in keys], dtype=pl.Boolean),
        ),
        unknown_predictions=len(unknown_predictions),
        unknown_rows=len(unknown_rows),
    )
