"""Time and memory of ingestion, materialisation and a training set, for tables of different sizes.

Each size has its own cluster in a temporary folder (`BENCH_FOLDER` is its parent). The source is one Parquet file with
ten rows of eight float64 per entity, in random order of time. Memory is the sum of PSS of the cluster's processes and
of the command, sampled every half second, minus the cluster's memory before the command.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.host import processes
from cluster.session import find_record
from cluster.settings import PortsConfig, StorageConfig
from tests.servers.ports import free_port

ROWS_PER_ENTITY, FEATURES = 10, 8
GROUP_ROWS, SAMPLE_S = 1_000_000, 0.5
START_US, DAY_US = 1_767_225_600_000_000, 86_400_000_000
TIME = pa.timestamp("us", "UTC")
DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource

entity = Entity("thing", join_keys=["thing_id"])
views = [
    FeatureView(
        f"v{number}",
        entities=[entity],
        source=FileSource("source.parquet", event_timestamp="at"),
        schema=[Field(f"f{column}", "float64") for column in range(%d)],
    )
    for number in range(%d)
]
service = FeatureService("all", views=views)
for view in views:
    globals()[view.name] = view
"""


@dataclass(kw_only=True)
class Memory:
    """Samples the memory of a cluster and of one command."""

    cluster_id: str
    command: int | None = None
    peak: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def now(self) -> int:
        """Return the memory in bytes."""
        found = {process.pid: process for process in processes.find(self.cluster_id)}
        if self.command is not None:
            try:
                one = psutil.Process(self.command)
                found |= {process.pid: process for process in (one, *one.children(recursive=True))}
            except psutil.NoSuchProcess:
                pass
        return sum(_pss(process.pid) for process in found.values())

    def watch(self) -> None:
        """Sample until `_ended` is set."""
        while not self._ended.wait(SAMPLE_S):
            self.peak = max(self.peak, self.now())


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def write_source(folder: Path, rows: int) -> None:
    """Write the source, and entity rows for a tenth of the entities."""
    draw, entities = np.random.default_rng(7), max(rows // ROWS_PER_ENTITY, 1)
    writer: pq.ParquetWriter | None = None
    for first in range(0, rows, GROUP_ROWS):
        count = min(GROUP_ROWS, rows - first)
        at = START_US + draw.integers(0, 90 * DAY_US, count)
        columns = {
            "thing_id": draw.integers(0, entities, count),
            "at": pa.array(at, pa.int64()).cast(TIME),
            **{f"f{column}": draw.standard_normal(count) for column in range(FEATURES)},
        }
        table = pa.table(columns)
        if writer is None:
            writer = pq.ParquetWriter(folder / "source.parquet", table.schema, use_dictionary=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    asked = min(entities, 1_000_000)
    times = pa.array(START_US + draw.integers(0, 90 * DAY_US, asked), pa.int64()).cast(TIME)
    people = pa.table({"thing_id": draw.permutation(entities)[:asked], "event_timestamp": times})
    pq.write_table(people, folder / "entities.parquet")


class Cluster:
    """A cluster in a folder of its own, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        root = str(Path(__file__).resolve().parents[2])
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FALAJ_"))}
        self._env = clean | {"PYTHONPATH": f"{root}:{folder}"}

    def run(self, module: str, *words: str) -> None:
        """Run a command in the foreground."""
        subprocess.run([sys.executable, "-m", module, *words], cwd=self.folder, env=self._env, check=True)

    def measure(self, module: str, *words: str) -> dict[str, float]:
        """Run a command, and return its seconds and its peak memory above the idle cluster in GiB."""
        record = find_record(StorageConfig(root=str(self.folder / ".falaj")))
        assert record is not None
        memory = Memory(cluster_id=record.cluster_id)
        idle, began = memory.now(), time.perf_counter()
        arguments = [sys.executable, "-m", module, *words]
        command = subprocess.Popen(arguments, cwd=self.folder, env=self._env)
        memory.command = command.pid
        watcher = threading.Thread(target=memory.watch)
        watcher.start()
        try:
            code = command.wait()
        finally:
            memory._ended.set()
            watcher.join()
        assert code == 0, f"{module} ended with {code}"
        return {"seconds": time.perf_counter() - began, "peak_gib": max(memory.peak - idle, 0) / 2**30}


@contextmanager
def running_cluster(folder: Path, definitions: str) -> Iterator[Cluster]:
    """Start a cluster with these definitions on free ports, and stop it at the end."""
    cluster = Cluster(folder)
    (folder / "things.py").write_text(definitions)
    ports = [f"cluster.ports.{name}={free_port()}" for name in PortsConfig.__dataclass_fields__]
    try:
        cluster.run("cluster.up", *ports)
        cluster.run("feature_jobs.apply", "definitions=things")
        yield cluster
    finally:
        cluster.run("cluster.down")


def measure(rows: int) -> Iterator[dict[str, Any]]:
    """Yield the figures for a table with this many rows."""
    case = f"{rows:,} rows"
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        folder = Path(name)
        write_source(folder, rows)
        with running_cluster(folder, DEFINITIONS % (FEATURES, 1)) as cluster:
            for step, words in (
                ("ingest", ("feature_jobs.ingest", "view=v0")),
                ("materialise", ("feature_jobs.materialize", "view=v0")),
                (
                    "training_set",
                    (
                        "feature_jobs.training_set",
                        "service=all",
                        "entities=entities.parquet",
                        "output=t.parquet",
                    ),
                ),
            ):
                module, *options = words
                figures = cluster.measure(module, "definitions=things", *options)
                figures["us_per_row"] = figures["seconds"] * 1e6 / rows
                for metric, value in figures.items():
                    unit = {"seconds": "s", "peak_gib": "GiB", "us_per_row": "µs"}[metric]
                    yield {
                        "system": "falaj",
                        "case": f"{step}, {case}",
                        "metric": metric,
                        "value": value,
                        "unit": unit,
                    }
                print(
                    f"{case:>18} {step:13} {figures['seconds']:8.1f} s {figures['peak_gib']:6.2f} GiB above idle "
                    f"{figures['us_per_row']:7.2f} µs a row",
                    flush=True,
                )
