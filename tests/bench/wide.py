"""`make bench BENCH=wide`: the cost of a view with 100, 500 and 2,000 columns, each with a check, without HTTP and Ray.

`ingest`: 50 rows of a Parquet file into an empty table. `training_set`: 200 entity rows, with hash and manifest, as a
protected file. `materialise`: 50 entities. `push`: one row, until it is online. `read`: one entity, online.

The results are medians of `ROUNDS` runs, and the time per column divided by that of the view with 100 columns. This
ratio is 1 if the time grows in proportion to the number of columns. At 2,000 columns, the ratio is 20 if the time grows
with the square of the number of columns. A smaller ratio is better.
"""

from __future__ import annotations

import datetime as dt
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.security.keys.access import key_store
from cluster.storage import layout
from feature_jobs.materialize import MaterializeConfig, Run, materialise
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.online.reader import FeatureReader, open_online_store
from feature_jobs.store.streaming.pushed_view import load_pushed_view
from feature_jobs.store.streaming.pusher import Pusher, open_push_log
from feature_jobs.training_set import TrainingSetConfig, build_training_set, load_request
from tests.projects.batch import BatchProject, keys_of
from tests.servers.key_broker import running_broker

WIDTHS = (100, 500, 2_000)
ROUNDS = 3
ROWS, ASKED = 50, 200
AT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, NotNull

columns = [f"f{{number}}" for number in range({width})]
wide = FeatureView(
    "wide",
    entities=[Entity("person", join_keys=["person_id"])],
    source=FileSource("{folder}/wide.parquet", event_timestamp="at"),
    schema=[Field(name, "float64") for name in columns],
    checks=[NotNull(name) for name in columns],
)
service = FeatureService("service", views=[wide])
"""


def write_source(folder: Path, width: int, seed: int) -> None:
    """Write the source rows and the entity rows."""
    draw = np.random.default_rng(seed)
    values = {f"f{number}": draw.normal(size=ROWS) for number in range(width)}
    at = pa.array([AT] * ROWS, pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"person_id": range(ROWS), **values, "at": at}), folder / "wide.parquet")
    asked = pa.array([AT + dt.timedelta(days=1)] * ASKED, pa.timestamp("us", "UTC"))
    people = {"person_id": [number % ROWS for number in range(ASKED)], "event_timestamp": asked}
    pq.write_table(pa.table(people), folder / "people.parquet")


class Wide:
    """A project with one view of `width` columns, and the steps that are measured."""

    def __init__(self, project: BatchProject, width: int) -> None:
        self.project, self.width = project, width
        self.places = layout(project.storage)
        self.keys = key_store(project.access)
        self.store = open_online_store(project.online, self.places, self.keys, readonly=False)
        self.log = open_push_log(self.project.ledger, self.places, "wide", self.keys)
        self.pushes = 0

    def ingest(self) -> None:
        self.project.ingest("wide")

    def training_set(self) -> None:
        output = f"{self.project.storage.root}/train.parquet"
        entities = f"{self.project.root}/people.parquet"
        config = TrainingSetConfig(
            storage=self.project.storage, service="service", entities=entities, output=output
        )
        asked = load_request(config, self.project.ledger)
        build_training_set(config, asked, self.project.ledger, access=self.project.access, actor="bench")

    def materialise(self) -> None:
        config = MaterializeConfig(storage=self.project.storage, view="wide")
        run = Run(
            config=config,
            ledger=self.project.ledger,
            actor=self.project.actor,
            store=self.store,
            as_of=dt.datetime.now(dt.UTC),
        )
        materialise(run, "wide")

    def push(self) -> None:
        self.pushes += 1
        row = {
            "keys": {"person_id": 1},
            "features": {f"f{number}": 1.0 for number in range(self.width)},
            "event_timestamp": (AT + dt.timedelta(hours=self.pushes)).isoformat(),
        }
        pusher = Pusher(load_pushed_view(self.project.ledger, "wide"), self.places, self.store, self.log)
        now = dt.datetime.now(dt.UTC)
        answer = pusher.push([row], idempotency_key=str(self.pushes), digest=b"", now=now)
        assert answer["accepted"] == 1

    def read(self) -> None:
        reader = FeatureReader(service_spec(self.project.ledger, "service"), self.store)
        columns = reader.read([{"person_id": 2}], AT + dt.timedelta(days=1)).columns
        assert columns["wide__f0"][0] is not None

    def close(self) -> None:
        self.store.close()
        self.project.close()


STEPS: tuple[Callable[[Wide], None], ...] = (
    Wide.ingest,
    Wide.training_set,
    Wide.materialise,
    Wide.push,
    Wide.read,
)


def run(width: int, number: int) -> dict[str, float]:
    """Return the milliseconds of each step in a new project."""
    keys = (*keys_of("wide"), "training_sets/service/internal")
    with running_broker(*keys) as access, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder, width, number)
        definitions = DEFINITIONS.format(width=width, folder=folder)
        wide = Wide(BatchProject(folder, access, definitions, module="bench_wide"), width)
        taken = {}
        for step in STEPS:
            began = time.perf_counter()
            step(wide)
            taken[step.__name__] = (time.perf_counter() - began) * 1000
        wide.close()
    return taken


def main() -> None:
    """Measure and write the results."""
    runs: dict[int, list[dict[str, float]]] = {width: [] for width in WIDTHS}
    run(WIDTHS[0], 0)  # not counted: it imports each library and uses it for the first time
    for number in range(ROUNDS):
        for width in WIDTHS:
            runs[width].append(run(width, number))
    results: list[dict[str, Any]] = []
    for step in (one.__name__ for one in STEPS):
        narrow = 0.0
        for width in WIDTHS:
            value = statistics.median(one[step] for one in runs[width])
            narrow = narrow or value / width
            ratio = value / width / narrow
            case = f"{step} x{width}"
            said = {"system": "falaj", "case": case}
            results += [
                said | {"metric": "p50_ms", "value": value, "unit": "ms"},
                said | {"metric": "per_column", "value": ratio, "unit": f"of x{WIDTHS[0]}"},
            ]
            print(f"{case:20} {value:9.1f} ms, {ratio:5.2f} of x{WIDTHS[0]} a column")
    output = Path(".falaj/bench/wide.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
