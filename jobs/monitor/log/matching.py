"""Join the answers of some chunks with their outcomes."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson
import polars as pl

from cluster.records.reading import INVALID_OUTCOME, OUTCOME, exact_column
from cluster.runtime import OutcomeParser
from jobs.monitor.log.decode import text_if_mixed

COLUMNS = ("prediction_id", "row", "outcome", "received_at")
"""Columns of the outcome log's table that matching needs."""
_KEY = ["prediction_id", "row"]


class Matched(NamedTuple):
    """Answers with their outcomes."""

    rows: pl.DataFrame
    """The answers with two more columns: `outcome` (class or number, null if unknown), and `odd_outcome` (whether the
    last received outcome is invalid for the model)."""
    unknown_rows: int
    """Number of outcomes whose prediction has answers here, but not the row."""


def match(answers: pl.DataFrame, outcomes: pl.DataFrame, truths: OutcomeParser) -> Matched:
    """Assign each answered row its last valid outcome. An invalid outcome does not replace an earlier valid one.

    Args:
        answers: Answered rows of one version.
        outcomes: Outcomes in the order in which they were written, with the columns `COLUMNS`. `outcome` is JSON.
        truths: Parser of the version's outcomes.
    """
    ours = outcomes.filter(pl.col("prediction_id").is_in(answers["prediction_id"].unique().implode()))
    ours = ours.sort("received_at", maintain_order=True)
    texts = ours["outcome"].to_list()
    parsed_texts: dict[Any, Any] = {
        text: None if text is None else truths.parse(orjson.loads(text)) for text in set(texts)
    }
    values = [parsed_texts[text] for text in texts]
    ours = ours.with_columns(
        pl.int_range(pl.len()).alias("_position"),
        pl.Series("_invalid", [value is None for value in values], dtype=pl.Boolean),
    )
    last = ours.unique(_KEY, keep="last", maintain_order=True)
    valid = ours.filter(~pl.col("_invalid")).unique(_KEY, keep="last", maintain_order=True)
    joined = answers.join(valid.select(*_KEY, "_position"), on=_KEY, how="left", maintain_order="left").join(
        last.select(*_KEY, "_invalid"), on=_KEY, how="left", maintain_order="left"
    )
    found = [None if position is None else values[position] for position in joined["_position"].to_list()]
    rows = joined.with_columns(
        text_if_mixed(exact_column(OUTCOME, found)),
        pl.col("_invalid").fill_null(False).alias(INVALID_OUTCOME),
    ).drop("_position", "_invalid")
    return Matched(rows, last.join(answers, on=_KEY, how="anti").height)
