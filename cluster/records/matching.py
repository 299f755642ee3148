"""Logged answers with what came true for them, and how many outcomes belong to none.

Who may send outcomes can send any: for an answer that was never given, for a row that an answer does not have, or one
that the model cannot have meant. These are counted, and are in no figure. An outcome that means nothing also takes no
other one's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from cluster.records.reading import ODD, OUTCOME, Outcome, exact_column
from cluster.runtime import Truths


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """Answers with their outcomes."""

    answers: pl.DataFrame
    """Those of the versions that were asked for, with `outcome` (the class or the number that was meant, null where
    none is known) and `odd_outcome` (whether the last one that came means nothing to the model)."""
    unknown_predictions: int
    """Outcomes of answers that nobody logged."""
    unknown_rows: int
    """Outcomes of rows that a logged answer does not have."""


def match(answers: pl.DataFrame, outcomes: Iterable[Outcome], truths: Mapping[int, Truths]) -> Matched:
    """Give each answered row the last outcome that the model can have meant.

    Args:
        answers: all of a model's log, so that it is known which there are.
        outcomes: in the order in which they count.
        truths: of the versions whose answers are wanted.
    """
    place = ("prediction_id", "row")
    versions = dict(zip(answers.select(place).rows(), answers["version"].to_list(), strict=True))
    logged = {prediction_id for prediction_id, _ in versions}
    meant: dict[tuple[str, int], Any] = {}
    odd: dict[tuple[str, int], bool] = {}
    unknown_predictions: set[tuple[str, int]] = set()
    unknown_rows: set[tuple[str, int]] = set()
    for prediction_id, row, value in outcomes:
        key = (prediction_id, row)
        if key not in versions:
            (unknown_rows if prediction_id in logged else unknown_predictions).add(key)
        elif (version := truths.get(versions[key])) is not None:
            found = version.of(value)
            odd[key] = found is None
            if found is not None:
                meant[key] = found
    wanted = answers.filter(pl.col("version").is_in(list(truths)))
    keys = wanted.select(place).rows()
    return Matched(
        answers=wanted.with_columns(
            exact_column(OUTCOME, [meant.get(key) for key in keys]),
            pl.Series(ODD, [odd.get(key, False) for key in keys], dtype=pl.Boolean),
        ),
        unknown_predictions=len(unknown_predictions),
        unknown_rows=len(unknown_rows),
    )
