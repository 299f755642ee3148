"""Training sets from large tables: `pit_join.py --large 10M,100M` measures time and peak memory.

A table has eight float64 features, ten rows per entity, one bucket per 1.5 million rows (at least eight) and four
batches. It is written bucket by bucket with the feature store's own writer. A training set has a million entity rows.
Its peak memory is that of the whole process, with imports. It is written to a Parquet file, as the command does.

Run this file by its path: `_pit_large.py FOLDER OUTPUT` builds one training set and prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.source import TokenSource
from cluster.storage import read_parquet, write_parquet
from feature_jobs.store.catalog.protection import ORDERING
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec, ViewSpec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.row_hash import row_hash
from feature_jobs.store.offline.training_set import assemble, join_in_process

FEATURES, ROWS_PER_ENTITY, BATCHES, ENTITY_ROWS = 8, 10, 4, 1_000_000
BUCKET_ROWS, MIN_BUCKETS = 1_500_000, 8
START_US, SPAN_US, HOUR_US = 1_767_225_600_000_000, 90 * 86_400_000_000, 3_600_000_000
NAMES = [f"f{number}" for number in range(FEATURES)]
TIME = pa.timestamp("us", "UTC")
VIEW = ViewSpec(
    name="large",
    version="1",
    join_keys=["entity_id"],
    fields=[FieldSpec(name=name, dtype="float64", sensitivity="public", categorical=False) for name in NAMES],
    ttl_s=30 * 86_400,
)
PROTECTION = Protection(default="", keys=tuple((name, None) for name in ("entity_id", *ORDERING, *NAMES)))
NO_KEYS = KeyAccess(socket="", token=TokenSource())


def write_large(folder: Path, rows: int) -> None:
    """Write the feature table and the entity rows."""
    draw = np.random.default_rng(7)
    entities = np.arange(rows // ROWS_PER_ENTITY)
    buckets = max(MIN_BUCKETS, 1 << (rows // BUCKET_ROWS).bit_length())
    uri = f"{folder}/large"
    target = offline.Target(
        uri=uri, keys=("entity_id",), buckets=buckets, protection=PROTECTION, access=NO_KEYS
    )
    bucket_numbers = bucket_of(pa.table({"entity_id": entities}), ["entity_id"], num_buckets=buckets)
    files = []
    for bucket in range(buckets):
        for batch, part in enumerate(_batches(draw, entities[bucket_numbers == bucket], rows)):
            frame = pl.DataFrame(pl.from_arrow(part))
            files.append(
                offline.write_bucket(frame, part.schema, target, bucket=bucket, name=f"batch{batch}")
            )
    offline.create_table(uri, part.schema, num_buckets=buckets)
    batch_facts = offline.Batch(
        ingest_id="large", rows_in=rows, rows_stored=rows, rows_quarantined=0, reasons={}, quarantine=None
    )
    offline.commit(DeltaTable(uri), part.schema, files, batch_facts, seq=rows * BATCHES)
    entities_of_rows = draw.integers(0, len(entities), ENTITY_ROWS)
    times = _times(draw.integers(0, SPAN_US, ENTITY_ROWS))
    table = pa.table(
        {"row_id": np.arange(ENTITY_ROWS), "entity_id": entities_of_rows, "event_timestamp": times}
    )
    pq.write_table(table, folder / "entities.parquet")


def _batches(draw: np.random.Generator, entities: np.ndarray, rows: int) -> Iterator[pa.Table]:
    """Yield the rows of one bucket as batches, each with rows of all times."""
    who = draw.permutation(np.repeat(entities, ROWS_PER_ENTITY))
    for batch, part in enumerate(np.array_split(who, BATCHES)):
        event = draw.integers(0, SPAN_US, part.size)
        created = _times(event + draw.integers(0, HOUR_US, part.size))
        columns = {"entity_id": part, "event_timestamp": _times(event), "created_timestamp": created}
        features = {name: draw.standard_normal(part.size) for name in NAMES}
        seq = np.arange(part.size) + batch * rows
        yield pa.table({**columns, **features, "ingested_at": created, "ingest_seq": seq})


def _times(us: np.ndarray) -> pa.Array:
    return pa.array(START_US + us, pa.int64()).cast(TIME)


def main() -> None:
    """Build one training set."""
    from tests.bench._pit_systems import peak_kib

    folder, output = Path(sys.argv[1]), sys.argv[2]
    idle = peak_kib()
    started = time.perf_counter()
    entities = read_parquet(f"{folder}/entities.parquet")
    pinned = offline.snapshot(
        f"{folder}/large", view="large", keys=VIEW.join_keys, protection=PROTECTION, access=NO_KEYS
    )
    service = ServiceSpec(name="large", version="1", views=[VIEW])
    built = assemble(service, {"large": pinned}, entities, join_parts=join_in_process)
    row_hash(built.table)
    write_parquet(built.table, output)
    seconds, cpu = time.perf_counter() - started, time.process_time()
    peak = {"peak_rss_mib": peak_kib() / 1024, "imports_rss_mib": idle / 1024}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu} | peak))


if __name__ == "__main__":
    main()
