"""Convert rows of a feature table to rows of the online store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl

from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.types.dtypes import decimal_of
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ


def plain_columns(dtypes: Mapping[str, str]) -> list[pl.Expr]:
    """Convert the columns that have another form in the online store than in the feature table.

    Timestamps become microseconds, dates become days, decimals become text.
    """
    columns = []
    for name, dtype in dtypes.items():
        if dtype == "timestamp":
            columns.append(pl.col(name).dt.epoch("us"))
        elif dtype == "date":
            columns.append(pl.col(name).to_physical())
        elif decimal_of(dtype) is not None:
            columns.append(pl.col(name).cast(pl.String))
    return columns


def online_rows(view: ViewSpec, known: pl.DataFrame) -> Iterator[OnlineRow]:
    """Yield each row as an online row.

    Args:
        view: the view of the rows.
        known: the view's join keys and features, `event_timestamp`, `created_timestamp`, `ingest_seq`, and `deleted` if
            there may be tombstones. A feature without a column is null.
    """
    keys, names, present = view.join_keys, [field.name for field in view.fields], set(known.columns)
    missing = [pl.lit(None).alias(name) for name in names if name not in present]
    plain = plain_columns({field.name: field.dtype for field in view.fields if field.name in present})
    deleted = pl.col(DELETED).fill_null(False) if DELETED in present else pl.lit(False).alias(DELETED)
    frame = known.with_columns(*plain, *missing).select(
        pl.col(EVENT).dt.epoch("us").alias("__event"),
        pl.col(CREATED).dt.epoch("us").alias("__created"),
        SEQ,
        deleted,
        *keys,
        *names,
    )
    for event_us, created_us, seq, is_deleted, *values in frame.iter_rows():
        yield OnlineRow(
            keys=tuple(values[: len(keys)]),
            event_us=event_us,
            created_us=created_us,
            seq=seq,
            values=() if is_deleted else values[len(keys) :],
            deleted=is_deleted,
        )
