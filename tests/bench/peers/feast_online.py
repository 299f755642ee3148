"""Feast's online reads, in Feast's own environment: load a store, then measure one round per input line.

    python feast_online.py FOLDER sqlite|redis REDIS_PORT ENTITIES FEATURES LOAD_SECONDS

After loading, this program prints one JSON line: the number of entities that it loaded within the time limit. After
each round, it prints another JSON line: the nanoseconds of each call.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64

AT = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PIECE = 10_000


def store_of(folder: Path, kind: str, port: str, names: list[str]) -> FeatureStore:
    """Return an applied feature view `v` with these features, over an online store of one kind."""
    online = (
        f"{{type: sqlite, path: {folder}/online.db}}"
        if kind == "sqlite"
        else f'{{type: redis, connection_string: "127.0.0.1:{port}"}}'
    )
    (folder / "feature_store.yaml").write_text(
        f"project: p\nprovider: local\nregistry: {folder}/registry.db\nonline_store: {online}\n"
        "offline_store: {type: dask}\nentity_key_serialization_version: 3\n"
    )
    store = FeatureStore(repo_path=str(folder))
    entity = Entity(name="e", join_keys=["id"], value_type=ValueType.INT64)
    first = {"id": [0], "event_timestamp": [AT]} | {name: [0.0] for name in names}
    pd.DataFrame(first).to_parquet(folder / "source.parquet")
    view = FeatureView(
        name="v",
        entities=[entity],
        ttl=dt.timedelta(0),
        schema=[Field(name=name, dtype=Float64) for name in names],
        source=FileSource(name="s", path=str(folder / "source.parquet"), timestamp_field="event_timestamp"),
    )
    store.apply([entity, view])
    return store


def load(store: FeatureStore, names: list[str], entities: int, seconds: float) -> int:
    """Write entities until all are written or the time is over. Return the number of written entities."""
    draw, began, done = np.random.default_rng(0), time.monotonic(), 0
    while done < entities and time.monotonic() - began < seconds:
        size = min(PIECE, entities - done)
        frame = pd.DataFrame(draw.standard_normal((size, len(names))), columns=names)
        frame["id"], frame["event_timestamp"] = range(done, done + size), AT
        store.write_to_online_store("v", frame)
        done += size
    return done


def main() -> None:
    """Load the store. Then run one round for each input line `<entities per call> <calls>`, until the input ends."""
    folder, kind, port, entities, features, seconds = sys.argv[1:]
    names = [f"f{number}" for number in range(int(features))]
    store = store_of(Path(folder), kind, port, names)
    known = load(store, names, int(entities), float(seconds))
    print(json.dumps(known), flush=True)
    asked = [f"v:{name}" for name in names]
    draw = random.Random(1)
    for line in sys.stdin:
        size, calls = map(int, line.split())
        taken = []
        for _ in range(calls):
            rows = [{"id": draw.randrange(known)} for _ in range(size)]
            began = time.perf_counter_ns()
            store.get_online_features(features=asked, entity_rows=rows).to_dict()
            taken.append(time.perf_counter_ns() - began)
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()
