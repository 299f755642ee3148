"""Whole training sets compared with DuckDB: several views, keys from earlier views, batches, cutoff and TTL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.source import TokenSource
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline.bucket_join import JoinedBucket, join_bucket
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.offline.tables import BucketFile, Snapshot
from feature_jobs.store.offline.training_set import Part, assemble
from tests.projects.views import make_spec, service_of
from tests.samples.pit_oracle import expected, hidden, random_entities, random_features

PEOPLE, PLACES = [1, 2, 3], ["n", "s", "w"]
AMOUNTS = [None, 0.5, 1.5, 2.5]
VALUES: dict[str, dict[str, list[Any]]] = {
    "person": {"person_id": PEOPLE, "amount": AMOUNTS, "place": [None, *PLACES]},
    "place": {"place": PLACES, "rate": AMOUNTS},
    "pair": {"person_id": PEOPLE, "place": PLACES, "visits": [None, 1, 2, 3]},
}
KEYS = {"person": ["person_id"], "place": ["place"], "pair": ["person_id", "place"]}
DTYPES = {"amount": "float64", "rate": "float64", "visits": "int64", "place": "string", "person_id": "int64"}
BUCKETS = 3


@dataclass(frozen=True, kw_only=True)
class Batches(Snapshot):
    """A feature table whose files are in memory."""

    tables_by_path: dict[str, pa.Table]

    @contextlib.contextmanager
    def open(self, file: BucketFile, *, whole: bool = True) -> Iterator[Any]:
        yield FileInMemory(self.tables_by_path[file.path])


@dataclass(frozen=True)
class FileInMemory:
    """A file with row groups of two rows."""

    table: pa.Table

    @property
    def num_row_groups(self) -> int:
        return -(-self.table.num_rows // 2)

    def read(self, columns: Sequence[str], *, row_group: int | None = None) -> pa.Table:
        table = self.table.select([name for name in columns if name in self.table.column_names])
        return table if row_group is None else table.slice(2 * row_group, 2)


def stored(name: str, frame: pl.DataFrame, *, batches: int, tombstones: bool) -> Batches:
    """Return rows as ingestion stores them: one sorted file for each batch and bucket."""
    keys = KEYS[name]
    if not tombstones:
        frame = frame.drop("deleted")
    arrow = frame.to_arrow()
    types = {key: DTYPES[key] for key in keys}
    kinds = {"int64": pa.int64(), "string": pa.string()}
    keyed = pa.table({key: arrow[key].cast(kinds[kind]) for key, kind in types.items()})
    bucket_numbers = bucket_of(keyed, keys, num_buckets=BUCKETS)
    tables_by_path = {}
    for batch in range(batches):
        for bucket in range(BUCKETS):
            in_part = (bucket_numbers == bucket) & (np.arange(frame.height) % batches == batch)
            part = frame.filter(pl.Series(in_part))
            if part.height:
                ordered = part.sort(AVAILABLE, "event_timestamp", "created_timestamp", "ingest_seq")
                tables_by_path[f"bucket={bucket}/{batch}"] = ordered.to_arrow().cast(arrow.schema)
    files = tuple(
        BucketFile(path=path, bucket=int(path[7]), rows=table.num_rows, size_bytes=1)
        for path, table in tables_by_path.items()
    )
    return Batches(
        uri=name,
        version=1,
        num_buckets=BUCKETS,
        key_types=types,
        files=files,
        protection=Protection(default=""),
        access=KeyAccess(socket="", token=TokenSource()),
        tombstones=tombstones,
        tables_by_path=tables_by_path,
    )


def view(name: str, ttl: timedelta | None) -> ViewSpec:
    fields = {field: DTYPES[field] for field in VALUES[name] if field not in KEYS[name]}
    return make_spec(name, KEYS[name], ttl_h=None if ttl is None else ttl / timedelta(hours=1), **fields)


def definition(
    oracle: duckdb.DuckDBPyConnection,
    views: list[ViewSpec],
    ttls: list[timedelta | None],
    entities: pl.DataFrame,
    tables: dict[str, pl.DataFrame],
    *,
    cutoff: bool,
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Return the expected value of each output column, and the number of rows that each view's cutoff hides."""
    requests, columns, counts = entities, {}, {}
    for view, ttl in zip(views, ttls, strict=True):
        names = [field.name for field in view.fields]
        known, all_of_it = expected(
            oracle, requests, tables[view.name], keys=view.join_keys, columns=names, ttl=ttl
        )
        counts[view.name] = hidden(known, all_of_it) if cutoff else 0
        rows = known if cutoff else all_of_it
        for at, name in enumerate(names):
            values = [row[at] for row in rows]
            columns[f"{view.name}__{name}"] = values
            if name in ("place", "person_id") and name not in entities.columns:
                requests = requests.with_columns(pl.Series(name, values, pl.String))
    return columns, counts


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_training_set_equals_the_definition_in_sql(oracle: duckdb.DuckDBPyConnection, seed: int) -> None:
    """Ties, nulls, duplicates, tombstones, late corrections, expiry, several keys, batches, and pieces of batches."""
    draw = np.random.default_rng(seed)
    ttls = [None if draw.random() < 0.3 else timedelta(hours=int(draw.integers(1, 13))) for _ in VALUES]
    views = [view(name, ttl) for name, ttl in zip(VALUES, ttls, strict=True)]
    tombstones = {name: bool(draw.random() < 0.7) for name in VALUES}
    tables = {
        name: random_features(draw, int(draw.integers(0, 30)), values) for name, values in VALUES.items()
    }
    for name, has_tombstones in tombstones.items():
        if not has_tombstones:
            tables[name] = tables[name].with_columns(deleted=False)
    requests: dict[str, list[Any]] = {"person_id": [None, *PEOPLE, 9]}
    if draw.random() < 0.3:
        requests["place"] = [None, *PLACES, "x"]
    entities = random_entities(draw, int(draw.integers(1, 20)), requests).cast({"person_id": pl.Int64})
    snapshots: dict[str, Snapshot] = {
        name: stored(name, frame, batches=int(draw.integers(1, 4)), tombstones=tombstones[name])
        for name, frame in tables.items()
    }
    piece_rows = int(draw.choice([1, 3, 100]))

    def join_parts(snapshot: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool) -> list[JoinedBucket]:
        return [join_bucket(snapshot, view, *part, cutoff, piece_rows=piece_rows) for part in parts]

    for cutoff in (True, False):
        built = assemble(
            service_of(*views), snapshots, entities.to_arrow(), join_parts=join_parts, cutoff=cutoff
        )
        columns, counts = definition(oracle, views, ttls, entities, tables, cutoff=cutoff)
        assert columns == {name: built.table[name].to_pylist() for name in columns}
        assert counts == built.hidden
