"""`make bench BENCH=security_cost`: how much time encryption takes.

In one run, the same work is done with and without encryption, in turns.

Cases:
`write` and `read`: rows of a feature table, with half of the columns protected.
`join`: entity rows with such a table.
`artifact`: encrypting and decrypting a model file of 50 MB, compared with only hashing it.
`request`: what one prediction by key reads and logs, which is 16 features from the online store and one record. HTTP
and the model are left out, because they are the same with and without encryption.

The keys come from a real broker.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from deltalake import DeltaTable

from cluster.records.schema import PredictionRecord
from cluster.records.segments import SegmentWriter
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.envelope import Identity, open_bytes, seal_bytes
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess, key_store
from cluster.settings import OnlineConfig
from cluster.storage import Layout
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec, ViewSpec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.training_set import build, join_in_process
from feature_jobs.store.online.reader import FeatureReader, epoch_microseconds, open_online_store
from feature_jobs.store.online.rows import OnlineRow

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.servers.key_broker import running_broker

ROWS, ENTITIES, FEATURES, BUCKETS, TURNS = 1_000_000, 100_000, 8, 8, 5
ARTIFACT = Identity(artifact="models/m", version=1, part="model.onnx")
NAMES = [f"f{number}" for number in range(FEATURES)]
START = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = {name: f"features/v/{name}" for name in ("internal", "personal")}
SERVED = {"falaj": "personal", "plain": "public"}
LOG_KEY = "predictions/m/personal"
ONLINE_KEYS = [f"online/{view}/{name}" for view in SERVED for name in ("internal", "personal")]
ONLINE_ENTITIES, ONLINE_FEATURES, REQUESTS = 20_000, 16, 2_000


def rows() -> pa.Table:
    """Return the rows of a view."""
    draw = np.random.default_rng(0)
    times = pa.array(np.datetime64(START.replace(tzinfo=None), "us") + draw.integers(0, 10**12, ROWS)).cast(
        pa.timestamp("us", "UTC")
    )
    return pa.table(
        {
            "id": draw.integers(0, ENTITIES, ROWS),
            **{name: draw.normal(size=ROWS) for name in NAMES},
            "event_timestamp": times,
            "created_timestamp": times,
            "ingested_at": times,
            "ingest_seq": np.arange(ROWS),
        }
    )


def protections(table: pa.Table) -> dict[str, Protection]:
    """Return two protections: one encrypts half of the features, the other encrypts no column."""
    half = [(name, KEYS["personal"] if number % 2 else None) for number, name in enumerate(NAMES)]
    rest = [(name, None) for name in table.column_names if name not in NAMES and name != "id"]
    return {
        "falaj": Protection(default=KEYS["internal"], keys=(*half, *rest)),
        "plain": Protection(
            default=KEYS["internal"], keys=tuple((name, None) for name in table.column_names)
        ),
    }


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of a call in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median wall time of each function. They are called in turns; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(TURNS + 1):
        for name, work in works.items():
            value = seconds(work)
            if turn:
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def joins(table: pa.Table, folder: Path, access: KeyAccess) -> dict[str, Callable[[], Any]]:
    """For a protected and a plain feature table, return the function that runs the point-in-time join."""
    draw = np.random.default_rng(1)
    asked = pa.table(
        {
            "id": draw.integers(0, ENTITIES, ENTITIES),
            "event_timestamp": pa.array([START + timedelta(days=12)] * ENTITIES, pa.timestamp("us", "UTC")),
        }
    )
    fields = [
        FieldSpec(name=name, dtype="float64", sensitivity="internal", categorical=False) for name in NAMES
    ]
    spec = ViewSpec(name="v", version="1", join_keys=["id"], fields=fields, ttl_s=None)
    works: dict[str, Callable[[], Any]] = {}
    for name, protection in protections(table).items():
        uri = f"{folder}/{name}"
        target = offline.Target(uri=uri, keys=("id",), buckets=BUCKETS, protection=protection, access=access)
        offline.create_table(uri, table.schema, num_buckets=BUCKETS)
        files = offline.write_files(table, target, name="a")
        batch = offline.Batch(
            ingest_id="a", rows_in=ROWS, rows_stored=ROWS, rows_quarantined=0, reasons={}, quarantine=None
        )
        offline.commit(DeltaTable(uri), table.schema, files, batch, seq=ROWS)
        pinned = offline.snapshot(uri, view="v", keys=["id"], protection=protection, access=access)
        service = ServiceSpec(name="s", version="1", views=[spec])
        works[name] = lambda pinned=pinned, service=service: build(  # type: ignore[misc]
            service, {"v": pinned}, asked, join_parts=join_in_process
        )
    return works


def requests(folder: Path, access: KeyAccess) -> dict[str, Callable[[], Any]]:
    """For each kind, return a function that makes many requests. Each request reads another entity."""
    store = key_store(access)
    online = open_online_store(OnlineConfig(map_size_gib=0.5), Layout(str(folder)), store, readonly=False)
    at = epoch_microseconds(START)
    values = np.random.default_rng(3).normal(size=ONLINE_FEATURES).tolist()
    sealed = SegmentWriter(folder / "predictions" / "m", store=store, key=LOG_KEY)
    plain = os.open(folder / "plain.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    writes: dict[str, Callable[[PredictionRecord], Any]] = {
        "falaj": sealed.append,
        "plain": lambda record: os.write(plain, orjson.dumps(record) + b"\n"),
    }
    works = {}
    for kind, sensitivity in SERVED.items():
        fields = [
            FieldSpec(name=f"f{number}", dtype="float64", sensitivity=sensitivity, categorical=False)
            for number in range(ONLINE_FEATURES)
        ]
        view = ViewSpec(name=kind, version="1", join_keys=["id"], fields=fields, ttl_s=None)
        stored = (
            OnlineRow(keys=(key,), event_us=at, created_us=at, seq=key, values=values)
            for key in range(ONLINE_ENTITIES)
        )
        online.replace(view, {"id": "int64"}, stored)
        reader = FeatureReader(ServiceSpec(name="s", version="1", views=[view]), online)
        works[kind] = lambda reader=reader, write=writes[kind]: serve(reader, write)  # type: ignore[misc]
    return works


def serve(reader: FeatureReader, write: Callable[[PredictionRecord], Any]) -> None:
    """Read features and log a record, `REQUESTS` times."""
    for key in range(REQUESTS):
        vectors = reader.read([{"id": key}], START)
        record = PredictionRecord(
            prediction_id=f"{key:032}",
            request_id="",
            time=START.isoformat(),
            model="m",
            version=1,
            variant="champion",
            rollout="",
            arm="none",
            unit_hash="",
            as_of=START.isoformat(),
            entities=[{"id": key}],
            features=vectors.columns,
            predictions=[{"probability": 0.5, "label": 1}],
        )
        write(record)


def main() -> None:
    """Measure and write the results."""
    table = rows()
    blob = np.random.default_rng(2).bytes(50 * 10**6)
    with (
        running_broker(*KEYS.values(), *ONLINE_KEYS, LOG_KEY, "models/m") as access,
        tempfile.TemporaryDirectory() as name,
    ):
        folder, files, store = Path(name), protected_files(access), key_store(access)
        kinds = protections(table)
        cases: dict[str, dict[str, Callable[[], Any]]] = {
            "write": {
                kind: lambda kind=kind: files.write(table, f"{folder}/{kind}.parquet", kinds[kind])  # type: ignore[misc]
                for kind in kinds
            },
            "read": {kind: lambda kind=kind: files.read(f"{folder}/{kind}.parquet") for kind in kinds},  # type: ignore[misc]
        }
        cases["join"] = joins(table, folder, access)
        sealed = seal_bytes(blob, store=store, key="models/m", identity=ARTIFACT)
        cases["artifact"] = {
            "falaj": lambda: hashlib.sha256(
                open_bytes(sealed, store=store, key="models/m", identity=ARTIFACT)
            ),
            "plain": lambda: hashlib.sha256(blob),
        }
        cases["request"] = requests(folder, access)
        results = []
        for case, works in cases.items():
            taken = in_turns(works)
            if case == "request":
                taken = {kind: value / REQUESTS for kind, value in taken.items()}
            results += [
                {"system": kind, "case": case, "metric": "seconds", "value": value, "unit": "s"}
                for kind, value in taken.items()
            ]
            ratio = taken["falaj"] / taken["plain"]
            print(
                f"{case:10} protected {taken['falaj']:.6f} s, plain {taken['plain']:.6f} s, ratio {ratio:.2f}"
            )
    output = Path(".falaj/bench/security_cost.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
