"""Tests of a Kafka topic that actors read and a driver commits. Actors and drivers may end at any time."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import polars as pl
import psutil

from cluster.host import processes
from cluster.ledger.events import BatchIngested
from feature_jobs.store.catalog.protection import view_protection
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.offline.tables import snapshot
from tests.servers.kafka_broker import MockBroker, mock_broker

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from feature_jobs.store import Entity, FeatureView, Field, KafkaSource, Range

sensor = Entity("sensor", join_keys=["sensor_id"])
source = KafkaSource("{servers}", "readings", event_timestamp="at")


def doubled(table):
    at, twice = table.schema.get_field_index("volts"), [2 * one for one in table["volts"].to_pylist()]
    return table.set_column(at, "volts", [twice])


apart, whole = (
    FeatureView(
        name,
        entities=[sensor],
        source=source,
        schema=[Field("volts", "float64")],
        transform=doubled,
        checks=[Range("volts", minimum=0)],
    )
    for name in ("apart", "whole")
)
"""
TOPIC, WAIT_S, WAVE = "readings", 120.0, 300


def test_actors_and_drivers_that_are_killed_lose_and_double_nothing(falaj_cluster: Project) -> None:
    """Killed actors and drivers neither lose nor double rows.

    The disturbances are a killed actor, a driver that another driver replaced, and a killed driver. The table
    equals that of a single run without disturbances.
    """
    with mock_broker() as broker:
        (falaj_cluster.root / "sensors.py").write_text(DEFINITIONS.format(servers=broker.servers))
        falaj_cluster.run("feature_jobs.apply", "definitions=sensors", check=True)
        with streaming(falaj_cluster) as first:
            send(broker, wave=0)
            until(lambda: rows_of(falaj_cluster, "apart") == WAVE, first)
            [dead, left] = actors(falaj_cluster)
            send(broker, wave=1)
            dead.kill()
            until(lambda: rows_of(falaj_cluster, "apart") == 2 * WAVE, first)
            assert {one.pid for one in actors(falaj_cluster)} & {dead.pid, left.pid} == {left.pid}
            first.send_signal(signal.SIGSTOP)
            send(broker, wave=2)
            falaj_cluster.run("feature_jobs.stream", *command("apart"), "once=true", check=True)
            assert rows_of(falaj_cluster, "apart") == 3 * WAVE
            first.send_signal(signal.SIGCONT)
            send(broker, wave=3)
            said = first.communicate(timeout=WAIT_S)[0]
            assert (first.returncode, "started later" in said) == (2, True), said
        with streaming(falaj_cluster) as second:
            until(lambda: rows_of(falaj_cluster, "apart") > 3 * WAVE, second)
            second.kill()
        until(lambda: not actors(falaj_cluster))
        send(broker, wave=4)
        with streaming(falaj_cluster) as third:
            until(lambda: rows_of(falaj_cluster, "apart") == 5 * WAVE, third)
            third.terminate()
            said = third.communicate(timeout=WAIT_S)[0]
            assert (third.returncode, "Kafka rows taken" in said) == (0, True), said
        falaj_cluster.run("feature_jobs.stream", "source=kafka", "view=whole", "once=true", check=True)
    assert rows_of(falaj_cluster, "apart") == rows_of(falaj_cluster, "whole") == 5 * WAVE
    assert table_of(falaj_cluster, "apart").equals(table_of(falaj_cluster, "whole"))


def command(view: str) -> list[str]:
    """Return the arguments that stream a view, with few rows in each commit."""
    return ["source=kafka", f"view={view}", "kafka.consumers=2", "max_rows=40"]


def send(broker: MockBroker, *, wave: int) -> None:
    """Send rows to all partitions. Some of the rows are bad."""
    for partition in range(4):
        numbers = range(wave * WAVE + partition, (wave + 1) * WAVE, 4)
        rows: list[Any] = [
            {"sensor_id": n % 50, "volts": -1.0 if n % 10 == 7 else n / 8, "at": 1_704_067_200_000 + n}
            for n in numbers
        ]
        broker.send(TOPIC, *rows, partition=partition)


@contextlib.contextmanager
def streaming(project: Project) -> Iterator[subprocess.Popen[str]]:
    """Run a driver until the block ends."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "feature_jobs.stream", *command("apart")],
        cwd=project.root,
        env=project.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def until(reached: Callable[[], bool], driver: subprocess.Popen[str] | None = None) -> None:
    """Wait until `reached` returns true. Fail after a deadline, or when the driver ends."""
    deadline = time.monotonic() + WAIT_S
    while not reached():
        if driver is not None and driver.poll() is not None:
            raise AssertionError(driver.communicate()[0])
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def actors(project: Project) -> list[psutil.Process]:
    """Return the processes that read partitions."""
    found = []
    for one in processes.find(project.record.cluster_id):
        with contextlib.suppress(psutil.Error):
            if "PartitionReader" in " ".join(one.cmdline()):
                found.append(one)
    return found


def rows_of(project: Project, view: str) -> int:
    """Return the number of rows in the ledger. Require that each row is stored or quarantined."""
    entries = [entry.payload for entry in project.ledger().entries(BatchIngested)]
    batches = [entry for entry in entries if entry["view"] == view]
    rows = sum(batch["rows_in"] for batch in batches)
    assert rows == sum(batch["rows_stored"] + batch["rows_quarantined"] for batch in batches)
    return int(rows)


def table_of(project: Project, name: str) -> pl.DataFrame:
    """Return a view's stored rows, sorted so that their stored order does not matter."""
    spec = view_spec(project.ledger(), name)
    pinned = snapshot(
        str(project.storage_root / "features" / name),
        view=name,
        keys=spec.join_keys,
        protection=view_protection(spec),
        access=project.owner,
    )
    rows = pl.concat([pinned.read(bucket, ["volts"]) for bucket in range(pinned.num_buckets)])
    assert rows["ingest_seq"].is_unique().all()
    return rows.select("sensor_id", "event_timestamp", "volts").sort(pl.all())
