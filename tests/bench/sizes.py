"""`make bench BENCH=sizes`: bytes that are stored for one prediction, one entity and one event.

Together with the CPU times of the other benchmarks, these sizes say what a number of predictions a day needs
(`docs/performance.md`). Cases: `record` (a prediction record with 16 float features: one line of a segment, the CPU
time to compact it, and one row of the compacted table), `online` (one entity with 10 float64 features, in LMDB and in
Redis), and `ledger` (one event).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.records.segments import SegmentWriter
from cluster.security.keys.access import key_store
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout, write_bytes
from feature_jobs.store.online.reader import open_online_store
from tests.bench import _scale_ledger, online_read
from tests.samples.record_log import PERSONAL, new_keyring, prediction, run
from tests.servers.key_broker import running_broker
from tests.servers.redis_server import running_redis

RECORDS, ENTITIES, FEATURES, EVENTS = 40_000, 100_000, 10, 20_000
INPUTS = 16


def record_sizes(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the bytes of a record in a segment and in the table, and the CPU time of its compaction in µs."""
    keyring, draw = new_keyring(folder), random.Random(0)
    log = folder / "predictions" / "m"
    writer = SegmentWriter(log, store=keyring, key=PERSONAL)
    for number in range(RECORDS):
        label = "yes" if draw.random() > 0.5 else "no"
        writer.append(
            prediction(
                number,
                prediction_id=str(uuid.UUID(int=draw.getrandbits(128))),
                request_id=str(uuid.UUID(int=draw.getrandbits(128))),
                unit_hash=f"{draw.getrandbits(64):016x}",
                entities=[{"id": draw.randrange(10**7)}],
                features={f"income__f{index}": [draw.gauss(0, 1)] for index in range(INPUTS)},
                predictions=[{"probability": draw.random(), "label": label}],
                given=[],
            )
        )
    writer.close()
    yield "segment", size_of(log, "*.records") / RECORDS
    started = time.process_time()
    assert run(log, keyring)
    yield "compaction", (time.process_time() - started) / RECORDS * 1e6
    yield "table", size_of(log, "*.parquet") / RECORDS


def size_of(folder: Path, pattern: str) -> int:
    """Return the bytes of all files in a folder whose names match the pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def online_sizes(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the bytes of an entity in LMDB, and the memory that it adds to a Redis server."""
    online_read.ENTITIES = ENTITIES
    view = online_read.view_of(FEATURES)
    with running_broker("online/v10/internal") as access, running_redis() as url:
        server = redis.Redis.from_url(url)
        empty = server.info("memory")["used_memory"]
        for name, config in (
            ("lmdb", OnlineConfig(map_size_gib=8.0)),
            ("redis", OnlineConfig(kind=OnlineKind.redis, url=url)),
        ):
            store = open_online_store(config, Layout(str(folder)), key_store(access), readonly=False)
            store.replace(view, {"id": "int64"}, online_read.rows(FEATURES))
            used = server.info("memory")["used_memory"] - empty
            # A file of LMDB has holes, so its blocks count and not its length.
            on_disk = sum(
                path.stat().st_blocks * 512 for path in (folder / "online").rglob("*") if path.is_file()
            )
            yield name, (used if config.kind is OnlineKind.redis else on_disk) / ENTITIES


def ledger_sizes(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the bytes of an event in SQLite, with the event index."""
    _scale_ledger.build(folder / "ledger", EVENTS).close()
    yield "sqlite", size_of(folder / "ledger", "ledger.db*") / EVENTS


def main() -> None:
    """Measure, print and write the sizes."""
    rows: list[dict[str, Any]] = []
    for case, sizes in (("record", record_sizes), ("online", online_sizes), ("ledger", ledger_sizes)):
        with tempfile.TemporaryDirectory() as folder:
            for metric, value in sizes(Path(folder)):
                unit = "us" if metric == "compaction" else "bytes"
                rows.append({"system": "falaj", "case": case, "metric": metric, "value": value, "unit": unit})
                print(f"{case:8} {metric:10} {value:8.0f} {unit}", flush=True)
    target = Path(".falaj/bench/sizes.json")
    write_bytes(str(target.absolute()), json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
