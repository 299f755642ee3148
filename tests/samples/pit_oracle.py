"""The point-in-time join as SQL for DuckDB, and random tables for which simple joins give wrong results."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import polars as pl

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
TIMES: dict[str, Any] = {
    "event_timestamp": TIME,
    "created_timestamp": TIME,
    "ingest_seq": pl.Int64,
    "deleted": pl.Boolean,
}
FOREVER = timedelta(days=3650)

# Select the rows that were known, take the greatest, then check its age. One query does this with and without cutoff.
_SQL = """
WITH found AS (
    SELECT e.position, e.event_timestamp AS asked_at, c.cutoff, f.*
    FROM entities AS e CROSS JOIN (VALUES (true), (false)) AS c(cutoff)
    LEFT JOIN features AS f
        ON {same} AND f.event_timestamp <= e.event_timestamp
        AND (f.created_timestamp <= e.event_timestamp OR NOT c.cutoff)
    QUALIFY row_number() OVER (
        PARTITION BY e.position, c.cutoff
        ORDER BY f.event_timestamp DESC, f.created_timestamp DESC, f.ingest_seq DESC
    ) = 1
), counted AS (
    SELECT *, coalesce(
        NOT deleted AND event_timestamp >= asked_at - to_microseconds(CAST({ttl} AS BIGINT)), false
    ) AS counts
    FROM found
)
SELECT {columns}, counts FROM counted ORDER BY cutoff DESC, position
"""
Rows = list[tuple[Any, ...]]


def connect() -> duckdb.DuckDBPyConnection:
    """Return a database that uses one thread."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET threads = 1")
    return connection


def expected(
    connection: duckdb.DuckDBPyConnection,
    entities: pl.DataFrame,
    features: pl.DataFrame,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    ttl: timedelta | None,
) -> tuple[Rows, Rows]:
    """Return the result of the join with the cutoff, and the result without the cutoff.

    Each row has the columns of one entity row, and whether a feature row was found.
    """
    connection.register("features", features.to_arrow())
    connection.register("entities", entities.with_row_index("position").to_arrow())
    query = _SQL.format(
        columns=", ".join(f"CASE WHEN counts THEN {name} END" for name in columns),
        same=" AND ".join(f"f.{key} = e.{key}" for key in keys),
        ttl=(ttl or FOREVER) // timedelta(microseconds=1),
    )
    rows = connection.execute(query).fetchall()
    return rows[: entities.height], rows[entities.height :]


def hidden(known: Rows, without_cutoff: Rows) -> int:
    """Return the number of entity rows for which a feature row was found only without the cutoff."""
    return sum(later[-1] and not row[-1] for row, later in zip(known, without_cutoff, strict=True))


def random_features(
    draw: np.random.Generator, size: int, values: dict[str, list[Any]], *, hours: int = 12
) -> pl.DataFrame:
    """Return random feature rows with few different keys and times. A quarter of them are tombstones.

    So there are many rows with equal times, duplicates, corrections and late rows.
    """
    event = draw.integers(0, hours, size)
    created = np.where(draw.random(size) < 0.5, event, draw.integers(0, hours, size))
    return pl.DataFrame(
        {
            **{
                name: [given[at] for at in draw.integers(0, len(given), size)]
                for name, given in values.items()
            },
            "event_timestamp": [START + timedelta(hours=int(hour)) for hour in event],
            "created_timestamp": [START + timedelta(hours=int(hour)) for hour in created],
            "ingest_seq": draw.permutation(size),
            "deleted": draw.random(size) < 0.25,
        },
        schema_overrides=TIMES,
        strict=False,
    )


def random_entities(
    draw: np.random.Generator, size: int, values: dict[str, list[Any]], *, hours: int = 14
) -> pl.DataFrame:
    """Return entity rows in random order. Some occur twice. The times of some differ by 1 µs from those of features."""
    at = [
        START + timedelta(hours=int(hour), microseconds=int(off))
        for hour, off in zip(draw.integers(0, hours, size), draw.integers(-1, 2, size), strict=True)
    ]
    columns = {
        name: [given[at] for at in draw.integers(0, len(given), size)] for name, given in values.items()
    }
    return pl.DataFrame(
        columns | {"event_timestamp": at}, schema_overrides={"event_timestamp": TIME}, strict=False
    )
