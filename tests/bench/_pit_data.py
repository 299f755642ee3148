"""The data of `pit_join`: feature tables with corrections, and entity rows to join features to.

Nine of ten rows are first reports, which become known up to an hour after their event. One of ten rows is a correction
of a first report. It becomes known up to two days after that report. Entities are drawn from a Zipf-Mandelbrot
distribution: one entity has twenty times as many rows as the average entity, and half of the entities have less than
half of the average. (Under Zipf's own law, where one entity has a tenth of all rows, Feast does not finish within
minutes.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

VIEWS, FEATURES = 3, 5
TTL_DAYS = 7
_START_US = 1_767_225_600_000_000  # 2026-01-01
_SPAN_S, _HOUR_S, _DAY_S = 90 * 86_400, 3_600, 86_400
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of the benchmark."""

    name: str
    rows: int
    """Number of rows of each feature table."""
    queries: int
    """Number of entity rows."""

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "")


CASES = (
    Case(name="3 x 1M x 100k", rows=1_000_000, queries=100_000),
    Case(name="3 x 5M x 1M", rows=5_000_000, queries=1_000_000),
)
TINY = Case(name="3 x 20k x 2k", rows=20_000, queries=2_000)


def feature_names(view: int) -> list[str]:
    """Return the feature names of a table. No two tables have a common name, so one query can return all features."""
    return [f"t{view}_f{number}" for number in range(FEATURES)]


def write_plain(case: Case, folder: Path) -> None:
    """Write `entities.parquet` and the feature tables `t0.parquet`, `t1.parquet`, ... as plain Parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(7)
    pq.write_table(_entities(case, draw), folder / "entities.parquet")
    for view in range(VIEWS):
        pq.write_table(_features(case, view, draw), folder / f"t{view}.parquet", compression="zstd")


def _entities(case: Case, draw: np.random.Generator) -> pa.Table:
    who = _who(draw, case, case.queries)
    who[: case.queries // 100] += case.rows  # no table knows these entities
    at = _seconds(draw, case.queries, _SPAN_S)
    return pa.table({"row_id": np.arange(case.queries), "entity_id": who, "event_timestamp": _times(at)})


def _features(case: Case, view: int, draw: np.random.Generator) -> pa.Table:
    first = case.rows * 9 // 10
    who, event = _who(draw, case, first), _seconds(draw, first, _SPAN_S)
    created = event + _seconds(draw, first, _HOUR_S)
    corrected = draw.choice(first, case.rows - first, replace=False)
    later = created[corrected] + 1 + _seconds(draw, len(corrected), 2 * _DAY_S)
    order = draw.permutation(case.rows)
    columns: dict[str, Any] = {
        "entity_id": np.concatenate([who, who[corrected]])[order],
        "event_timestamp": _times(np.concatenate([event, event[corrected]])[order]),
        "created_timestamp": _times(np.concatenate([created, later])[order]),
    }
    for name in feature_names(view):
        columns[name] = pa.array(draw.standard_normal(case.rows), mask=draw.random(case.rows) < 0.01)
    return pa.table(columns)


def _who(draw: np.random.Generator, case: Case, count: int) -> Ints:
    count_of = case.rows // 50
    weights = 1 / (np.arange(count_of) + count_of / 100)
    chance = np.cumsum(weights / weights.sum())
    # Entity ids are in random order, so an id does not show how many rows the entity has.
    names = np.random.default_rng(1).permutation(len(weights)).astype(np.int64)
    return names[np.searchsorted(chance, draw.random(count)).clip(0, len(weights) - 1)]


def _seconds(draw: np.random.Generator, count: int, limit: int) -> Ints:
    """Return `count` random durations in microseconds, uniform between 0 and `limit` seconds."""
    return draw.integers(0, limit * 1_000_000, count)


def _times(us: Ints) -> pa.Array:
    return pa.array(_START_US + us, pa.int64()).cast(pa.timestamp("us", "UTC"))
