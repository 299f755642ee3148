"""Logs for the benchmark of monitoring: NannyML's car loans, repeated, as an encrypted log and as plain Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from cluster.records.columns import schema
from cluster.records.table import LogTable
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from cluster.security.keys.store import KeyInfo

NUMBERS = ("car_value", "debt_to_income_ratio", "loan_length", "driver_tenure")
CATEGORIES = ("salary_range", "repaid_loan_on_prev_car", "size_of_downpayment")
INPUTS = (*NUMBERS, *CATEGORIES)
LABEL, SCORE, PREDICTED, TIME = "repaid", "y_pred_proba", "y_pred", "timestamp"
FILE_ROWS, DAY_ROWS = 50_000, 50_000
"""A file of the log's table has at most `FILE_ROWS` records, and each day has `DAY_ROWS` answers."""
COLUMN_CLASS = "internal"


def days(base: pl.DataFrame, rows: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of each day: the base rows in a random order, with the times of one day.

    Args:
        base: `DAY_ROWS` rows with inputs, label, score and predicted label.
        rows: Number of all rows.
    """
    start = np.datetime64("2026-01-01", "us")
    for day in range(rows // DAY_ROWS):
        times = start + np.timedelta64(day, "D") + np.arange(DAY_ROWS) * np.timedelta64(1, "s")
        yield base.sample(DAY_ROWS, shuffle=True, seed=day).with_columns(pl.Series(TIME, times))


def write_plain(base: pl.DataFrame, rows: int, path: Path) -> None:
    """Write the rows as one plain Parquet file."""
    pl.concat(days(base, rows)).write_parquet(path)


def write_log(base: pl.DataFrame, rows: int, *, folder: Path, model: str, access: KeyAccess) -> None:
    """Write the rows as the compacted logs of a model's version 1: predictions, and an outcome for each.

    Args:
        base, rows: See `days`.
        folder: The storage root.
        model: Name of the model.
        access: Access to the keys of the logs.
    """
    files = protected_files(access)
    for kind in ("predictions", "outcomes"):
        name = f"{kind}/{model}/{COLUMN_CLASS}"
        key_store(access).ensure(KeyInfo(name=name, column_class=COLUMN_CLASS))
    logs = {kind: LogTable(folder / kind / model) for kind in ("predictions", "outcomes")}
    written = {kind: [] for kind in logs}
    segments = []
    for number, part in enumerate(days(base, rows)):
        segments.append(f"{number:06}-bench")
        rows_of_day = _common(part, segments[-1], number)
        for kind, convert in (("predictions", _predictions), ("outcomes", _outcomes)):
            table = convert(rows_of_day, model).to_arrow().cast(schema(kind))
            logs[kind].ensure()
            written[kind].append(logs[kind].write_columns(table, COLUMN_CLASS, files))
    for kind, log in logs.items():
        log.commit(written[kind], segments)


def _common(rows: pl.DataFrame, segment: str, number: int) -> pl.DataFrame:
    return rows.with_columns(
        pl.lit(segment).alias("segment"),
        pl.int_range(pl.len()).alias("line"),
        pl.format(
            "{}{}",
            pl.lit(f"{number:08x}"),
            pl.int_range(pl.len()).hash(number).cast(pl.String).str.pad_start(24, "0"),
        ).alias("prediction_id"),
        pl.col(TIME).dt.replace_time_zone("UTC").alias("as_of"),
    )


def _predictions(rows: pl.DataFrame, model: str) -> pl.DataFrame:
    values = [pl.format(f'"{name}":[{{}}]', _json(name)) for name in INPUTS]
    constant = {
        "request_id": "", "model": model, "variant": "champion", "rollout": "", "arm": "outside", "unit_hash": "",
        "given": "[]", "defaulted": "{}", "other": '{"fault":""}',
    }  # fmt: skip
    return rows.with_columns(
        pl.col("as_of").alias("time"),
        pl.lit(1, pl.Int64).alias("version"),
        pl.concat_str(pl.lit('[{"id":'), pl.col("line").cast(pl.String), pl.lit("}]")).alias("entities"),
        pl.concat_str(pl.lit("{"), pl.concat_str(values, separator=","), pl.lit("}")).alias("features"),
        pl.concat_str(
            pl.lit('[{"label":'),
            pl.col(PREDICTED).cast(pl.Int64).cast(pl.String),
            pl.lit(',"probability":'),
            pl.col(SCORE).cast(pl.String),
            pl.lit("}]"),
        ).alias("predictions"),
        *(pl.lit(value).alias(name) for name, value in constant.items()),
    ).select(schema("predictions").names)


def _outcomes(rows: pl.DataFrame, model: str) -> pl.DataFrame:
    del model
    return rows.with_columns(
        pl.lit(0, pl.Int64).alias("row"),
        pl.col(LABEL).cast(pl.Int64).cast(pl.String).alias("outcome"),
        (pl.col("as_of") + pl.duration(days=1)).alias("observed_at"),
        (pl.col("as_of") + pl.duration(days=1)).alias("received_at"),
        pl.lit(None, pl.String).alias("other"),
    ).select(schema("outcomes").names)


def _json(name: str) -> pl.Expr:
    column = pl.col(name)
    if name in NUMBERS:
        return column.cast(pl.String)
    if name == "repaid_loan_on_prev_car":
        return pl.when(column).then(pl.lit("true")).otherwise(pl.lit("false"))
    return pl.concat_str(pl.lit('"'), column, pl.lit('"'))
