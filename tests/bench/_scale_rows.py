"""Time and memory of ingestion, materialisation and training sets, by rows, by entities and by views.

A feature row has eight float64 and a random time. The source is one Parquet file, and a training set has a row for each
entity, at most a million. Memory is the sum of the proportional set sizes (PSS) of the cluster's processes and of the
command, every half second, minus that sum of the idle cluster before the first command. Data and clusters are in
temporary folders; `BENCH_FOLDER` names another folder for them.

- `rows`: tables of `ROWS` rows (default 1M), ten for each entity; each size has its own cluster.
- `entities`: tables of a million rows with `ENTITIES` entities (default 10k,100k,1M).
- `views`: `VIEWS` views (default 1,5,20) of 100,000 rows each, in one command and in one service.

`ROWS=1M,10M,100M` needs 30 GB of disk and about an hour.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
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

ROWS_PER_ENTITY, FEATURES, ENTITY_ROWS = 10, 8, 1_000_000
GROUP_ROWS, SAMPLE_S, FIND_EVERY = 1_000_000, 0.5, 4
START_US, DAY_US = 1_767_225_600_000_000, 86_400_000_000
TIME = pa.timestamp("us", "UTC")
UNITS = {"seconds": "s", "peak_gib": "GiB", "us_per_row": "µs"}
DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource

views = {{
    name: FeatureView(
        name,
        entities=[Entity("thing", join_keys=["thing_id"])],
        source=FileSource(source + ".parquet", event_timestamp="at"),
        schema=[Field(f"f{{column}}", "float64") for column in range({features})],
    )
    for name, source in {sources}.items()
}}
services = {{
    name: FeatureService(name, views=[views[view] for view in members]) for name, members in {services}.items()
}}
globals().update(views | services)
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size: a service of some views, each with the same source."""

    name: str
    rows: int
    entities: int
    views: int = 1

    @property
    def source(self) -> str:
        """Name of the source file without its suffix, and of the service."""
        return f"s{self.rows}_{self.entities}_{self.views}"

    @property
    def members(self) -> list[str]:
        """Names of the views."""
        return [f"{self.source}_v{number}" for number in range(self.views)]


@dataclass(kw_only=True)
class Memory:
    """Samples the memory of a cluster and of one command."""

    cluster_id: str
    command: int | None = None
    peak: int = 0
    pids: set[int] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)

    def now(self, *, refresh: bool = True) -> int:
        """Return the memory in bytes. Finding the processes takes longer than reading their memory."""
        if refresh:
            self.pids = {process.pid for process in processes.find(self.cluster_id)}
            if self.command is not None and psutil.pid_exists(self.command):
                children = psutil.Process(self.command).children(recursive=True)
                self.pids |= {self.command, *(child.pid for child in children)}
        return sum(map(_pss, self.pids))

    def watch(self) -> None:
        """Sample until `ended` is set."""
        for number in itertools.count():
            if self.ended.wait(SAMPLE_S):
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self.peak = max(self.peak, self.now(refresh=number % FIND_EVERY == 0))


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def write_source(folder: Path, case: Case) -> None:
    """Write the source `<source>.parquet`, and the entity rows `<source>_entities.parquet`."""
    draw = np.random.default_rng(7)
    writer: pq.ParquetWriter | None = None
    for first in range(0, case.rows, GROUP_ROWS):
        count = min(GROUP_ROWS, case.rows - first)
        columns = {
            "thing_id": draw.integers(0, case.entities, count),
            "at": _times(draw, count),
            **{f"f{column}": draw.standard_normal(count) for column in range(FEATURES)},
        }
        table = pa.table(columns)
        if writer is None:
            writer = pq.ParquetWriter(folder / f"{case.source}.parquet", table.schema, use_dictionary=False)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    asked = draw.permutation(case.entities)[:ENTITY_ROWS]
    people = pa.table({"thing_id": asked, "event_timestamp": _times(draw, len(asked))})
    pq.write_table(people, folder / f"{case.source}_entities.parquet")


def _times(draw: np.random.Generator, count: int) -> pa.Array:
    return pa.array(START_US + draw.integers(0, 90 * DAY_US, count), pa.int64()).cast(TIME)


class Cluster:
    """A cluster in a folder of its own, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._idle: int | None = None
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
        if self._idle is None:
            self._idle = memory.now()
        began = time.perf_counter()
        arguments = [sys.executable, "-m", module, "definitions=things", *words]
        command = subprocess.Popen(arguments, cwd=self.folder, env=self._env)
        memory.command = command.pid
        watcher = threading.Thread(target=memory.watch)
        watcher.start()
        try:
            code = command.wait()
        finally:
            memory.ended.set()
            watcher.join()
        assert code == 0, f"{module} ended with {code}"
        seconds, peak = time.perf_counter() - began, max(memory.peak - self._idle, 0)
        return {"seconds": seconds, "peak_gib": peak / 2**30}


@contextmanager
def running_cluster(cases: Sequence[Case]) -> Iterator[Cluster]:
    """Write the cases' sources, and start a cluster with their definitions on free ports. Stop it at the end."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as name:
        folder = Path(name)
        for case in cases:
            write_source(folder, case)
        sources = {view: case.source for case in cases for view in case.members}
        services = {case.source: case.members for case in cases}
        definitions = DEFINITIONS.format(features=FEATURES, sources=sources, services=services)
        (folder / "things.py").write_text(definitions)
        cluster = Cluster(folder)
        ports = [f"cluster.ports.{name}={free_port()}" for name in PortsConfig.__dataclass_fields__]
        try:
            cluster.run("cluster.up", *ports)
            cluster.run("feature_jobs.apply", "definitions=things")
            yield cluster
        finally:
            cluster.run("cluster.down")


def measure(cluster: Cluster, case: Case) -> Iterator[dict[str, Any]]:
    """Yield the figures of each step."""
    members, files = f"view=[{','.join(case.members)}]", case.source
    steps = {
        "ingest": ("feature_jobs.ingest", members),
        "materialise": ("feature_jobs.materialize", members),
        "training_set": (
            "feature_jobs.training_set",
            f"service={files}",
            f"entities={files}_entities.parquet",
            f"output={files}_training.parquet",
        ),
    }
    for step, words in steps.items():
        figures = cluster.measure(*words)
        figures["us_per_row"] = figures["seconds"] * 1e6 / (case.rows * case.views)
        for metric, value in figures.items():
            result = {"case": f"{step}, {case.name}", "metric": metric, "value": value, "unit": UNITS[metric]}
            yield {"system": "falaj", **result}
        print(
            f"{case.name:>18} {step:13} {figures['seconds']:8.1f} s {figures['peak_gib']:6.2f} GiB above idle "
            f"{figures['us_per_row']:7.2f} µs a row",
            flush=True,
        )


def sizes(variable: str, default: str) -> list[int]:
    """Return the sizes in an environment variable, such as `10k,1M`."""
    units = {"k": 10**3, "M": 10**6}
    words = os.environ.get(variable, default).split(",")
    return [int(word.rstrip("kM")) * units.get(word[-1], 1) for word in words]


def by_rows() -> Iterator[dict[str, Any]]:
    """Yield the figures of tables of different sizes."""
    for rows in sizes("ROWS", "1M"):
        case = Case(name=f"{rows:,} rows", rows=rows, entities=max(rows // ROWS_PER_ENTITY, 1))
        with running_cluster([case]) as cluster:
            yield from measure(cluster, case)


def by_entities() -> Iterator[dict[str, Any]]:
    """Yield the figures of tables with different numbers of entities."""
    numbers = sizes("ENTITIES", "10k,100k,1M")
    cases = [Case(name=f"{number:,} entities", rows=10**6, entities=number) for number in numbers]
    with running_cluster(cases) as cluster:
        for case in cases:
            yield from measure(cluster, case)


def by_views() -> Iterator[dict[str, Any]]:
    """Yield the figures of services with different numbers of views."""
    numbers = sizes("VIEWS", "1,5,20")
    cases = [Case(name=f"{number} views", rows=10**5, entities=10**4, views=number) for number in numbers]
    with running_cluster(cases) as cluster:
        for case in cases:
            yield from measure(cluster, case)
