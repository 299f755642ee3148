"""The systems of `pit_join`. Each reads Parquet from disk and writes Parquet to disk, in its own process.

Run this file by its path: `_pit_systems.py SYSTEM FOLDER OUTPUT [URI]`. With a URI, Polars and Falaj read all inputs
from that folder of an object store, and Polars reads the files of Falaj's plaintext tables. Feast's own Python runs
this file too, so each function imports its packages itself. The file prints one JSON object: seconds without imports,
and the peak memory of this process.

The queries for DuckDB and Polars are written by hand and give the same result as the feature store. They return the row
with the greatest (event, created) that was available at the entity row's time, and nulls if that row is older than the
TTL. Feast has other semantics: it returns the newest event, even if that event was not known yet.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _pit_data import TTL_DAYS, VIEWS, feature_names

ALL = [name for view in range(VIEWS) for name in feature_names(view)]
Timed = Callable[[], dict[str, float]]


def polars(folder: Path, output: Path, uri: str | None = None) -> Timed:
    """Run the join with plain Polars and lazy frames."""
    import polars as pl

    def table(view: int) -> pl.LazyFrame:
        if uri is None:
            return pl.scan_parquet(folder / f"t{view}.parquet")
        names = ["entity_id", "event_timestamp", "created_timestamp", *feature_names(view)]
        return pl.scan_parquet(f"{uri}/plain/t{view}/*/*.parquet", hive_partitioning=False).select(names)

    def run() -> dict[str, float]:
        asked = pl.scan_parquet(f"{uri or folder}/entities.parquet").sort("event_timestamp")
        for view in range(VIEWS):
            known = (
                table(view)
                .with_columns(pl.max_horizontal("event_timestamp", "created_timestamp").alias("v"))
                .sort("v", "event_timestamp", "created_timestamp")
                .filter(pl.col("event_timestamp") >= pl.col("event_timestamp").cum_max().over("entity_id"))
                .drop("created_timestamp")
                .rename({"event_timestamp": "since"})
            )
            fresh = pl.col("since") >= pl.col("event_timestamp") - dt.timedelta(days=TTL_DAYS)
            asked = (
                asked.join_asof(
                    known, left_on="event_timestamp", right_on="v", by="entity_id", check_sortedness=False
                )
                .with_columns(pl.when(fresh).then(pl.col(name)).alias(name) for name in feature_names(view))
                .drop("since", "v", strict=False)
            )
        asked.sort("row_id").sink_parquet(output)
        return {}

    return run


def duckdb(folder: Path, output: Path) -> Timed:
    """Run the join with plain DuckDB in one statement."""
    import duckdb

    joins, columns = [], ["e.*"]
    for view in range(VIEWS):
        # The window sorts only the columns that it needs. This is faster than sorting the features too.
        rows = f"read_parquet('{folder}/t{view}.parquet', file_row_number = true)"
        joins.append(f"""
            ASOF LEFT JOIN (
                SELECT entity_id, event_timestamp, file_row_number,
                    greatest(event_timestamp, created_timestamp) AS v
                FROM {rows}
                QUALIFY event_timestamp >= max(event_timestamp) OVER (
                    PARTITION BY entity_id
                    ORDER BY greatest(event_timestamp, created_timestamp), event_timestamp, created_timestamp
                    ROWS UNBOUNDED PRECEDING
                )
            ) AS k{view} ON k{view}.entity_id = e.entity_id AND k{view}.v <= e.event_timestamp
            LEFT JOIN {rows} AS x{view} ON x{view}.file_row_number = k{view}.file_row_number
        """)
        fresh = f"k{view}.event_timestamp >= e.event_timestamp - INTERVAL {TTL_DAYS} DAY"
        columns += [f"CASE WHEN {fresh} THEN x{view}.{name} END AS {name}" for name in feature_names(view)]
    query = f"SELECT {', '.join(columns)} FROM '{folder}/entities.parquet' AS e {' '.join(joins)} ORDER BY e.row_id"
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")

    def run() -> dict[str, float]:
        connection.execute(f"COPY ({query}) TO '{output}' (FORMAT parquet)")
        return {}

    return run


def feast_duckdb(folder: Path, output: Path) -> Timed:
    """Run the join with Feast and its DuckDB offline store."""
    import pandas as pd
    import pyarrow.parquet as pq
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.repo_config import RegistryConfig
    from feast.types import Float64

    place = tempfile.mkdtemp(prefix="pit-feast-")
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider="local",
            registry=RegistryConfig(path=f"{place}/registry.db"),
            online_store={"type": "sqlite", "path": f"{place}/online.db"},
            offline_store={"type": "duckdb"},
            repo_path=place,
            entity_key_serialization_version=3,
        )
    )
    entity = Entity(name="entity", join_keys=["entity_id"], value_type=ValueType.INT64)
    views = [
        FeatureView(
            name=f"t{view}",
            entities=[entity],
            ttl=dt.timedelta(days=TTL_DAYS),
            schema=[Field(name=name, dtype=Float64) for name in feature_names(view)],
            source=FileSource(
                name=f"s{view}",
                path=str((folder / f"t{view}.parquet").resolve()),
                timestamp_field="event_timestamp",
                created_timestamp_column="created_timestamp",
            ),
        )
        for view in range(VIEWS)
    ]
    store.apply([entity, *views])
    features = [f"t{view}:{name}" for view in range(VIEWS) for name in feature_names(view)]

    def run() -> dict[str, float]:
        asked = pd.read_parquet(folder / "entities.parquet")
        table = store.get_historical_features(entity_df=asked, features=features).to_arrow()
        pq.write_table(table, output)
        return {}

    return run


def falaj(
    folder: Path, output: Path, uri: str | None = None, *, tables: str = "plain", tasks: bool = False
) -> Timed:
    """Run the feature store's join on its own tables, and compute the hashes for the manifest."""
    from concurrent.futures import ThreadPoolExecutor

    import polars  # noqa: F401 (import time is not measured, as for the others)

    if uri is not None:
        import s3fs  # noqa: F401

    from cluster.storage import read_parquet, write_parquet
    from feature_jobs.store.catalog.specifications import ViewSpec
    from feature_jobs.store.offline.row_hash import row_hash
    from feature_jobs.store.offline.tables import Snapshot, snapshot
    from feature_jobs.store.offline.training_set import REMOTE_THREADS, assemble, join_in_process
    from tests.bench._pit_tables import access_of, service

    spec, protections = service(protected=tables == "protected")
    access = access_of(folder)
    join_parts = _ray_tasks() if tasks else join_in_process

    def pin(view: ViewSpec) -> Snapshot:
        return snapshot(
            f"{uri or folder}/{tables}/{view.name}",
            view=view.name,
            keys=view.join_keys,
            protection=protections[view.name],
            access=access,
        )

    def run() -> dict[str, float]:
        entities = read_parquet(f"{uri or folder}/entities.parquet")
        with ThreadPoolExecutor(REMOTE_THREADS) as threads:
            snapshots = dict(
                zip([view.name for view in spec.views], threads.map(pin, spec.views), strict=True)
            )
        built = assemble(spec, snapshots, entities, join_parts=join_parts)
        started = time.perf_counter()
        row_hash(entities)
        row_hash(built.table)
        hashed = time.perf_counter() - started
        write_parquet(built.table, str(output))
        return {"row_hash_seconds": hashed}

    return run


def _ray_tasks() -> Any:
    """Start Ray on this machine, wait for its workers, and return the join of the command."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # on loopback only, for the length of one run
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    from feature_jobs.training_set import join_in_tasks

    ray.init(
        num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
    )
    started = ray.remote(lambda: time.sleep(0.2))
    ray.get([started.remote() for _ in range(2 * (os.cpu_count() or 1))])
    return functools.partial(join_in_tasks, selector={})


SYSTEMS: dict[str, Callable[..., Timed]] = {
    "falaj": falaj,
    "falaj_protected": functools.partial(falaj, tables="protected"),
    "falaj_ray": functools.partial(falaj, tasks=True),
    "polars": polars,
    "duckdb": duckdb,
    "feast_duckdb": feast_duckdb,
}


def peak_kib() -> int:
    """Return the peak memory of this process in KiB.

    `getrusage` is not used, because its value includes the memory before this process started this program.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


def main() -> None:
    """Run one system once."""
    system, folder, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    run = SYSTEMS[system](folder, output, *sys.argv[4:])
    started = time.perf_counter()
    more = run()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_rss_mib": peak_kib() / 1024} | more), flush=True)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    os._exit(0)  # Feast's threads would keep the process alive


if __name__ == "__main__":
    main()
