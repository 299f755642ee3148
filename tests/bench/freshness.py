"""`make bench BENCH=freshness`: time from sending a row until it can be read online, while rows are sent all the time.

`push`: the time until the push has an answer and the row was read. By then, the row was checked and is on disk and in
LMDB (both with fsync).
`kafka`: the time from the producer's call until a reader gets the row. Reader and consumer run in two processes. The
row is sent through librdkafka's mock broker, committed to Delta, and then written into the online store.

The benchmark runs without HTTP and Ray. HTTP and Ray add a constant few milliseconds to `push`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.security.keys.access import KeyAccess
from feature_jobs.store.streaming.kafka_consumer import ConsumerSettings, consume
from tests.projects.push import PushProject, kafka_view, message, row
from tests.servers.kafka_broker import MockBroker
from tests.servers.key_broker import running_broker

ROWS, PEOPLE, PERIOD_S, DEADLINE_S = 250, 100, 0.02, 30.0
KEYS = [
    "push/income/sensitive",
    "quarantine/income/sensitive",
    *(f"{folder}/income/{name}" for folder in ("features", "online") for name in ("internal", "personal")),
]


def stream(root: str, access: KeyAccess, servers: str) -> None:
    """Run a consumer until it is killed."""
    project = PushProject(Path(root), access, view=kafka_view(servers))
    reading = ConsumerSettings(source=project.topic, linger_s=0.05)
    consume(project.kafka(), reading, threading.Event())


def until_read(project: PushProject, number: int) -> None:
    """Wait until the online store returns the value of a row."""
    person, deadline = number % PEOPLE, time.monotonic() + DEADLINE_S
    while project.amounts(person, hour=ROWS / 60) != [float(number)]:
        assert time.monotonic() < deadline, f"row {number} never came"
        time.sleep(0.001)


def measured(project: PushProject, send: Callable[[int], None]) -> list[float]:
    """Return for each row the seconds from sending to reading.

    At most one row is sent every few milliseconds.
    """
    taken = []
    for number in range(ROWS):
        began = time.perf_counter()
        send(number)
        until_read(project, number)
        taken.append(time.perf_counter() - began)
        time.sleep(max(PERIOD_S - taken[-1], 0.0))
    return taken


def push(root: Path, access: KeyAccess) -> list[float]:
    """Return the times of pushed rows, in seconds."""
    project = PushProject(root, access)

    def send(number: int) -> None:
        project.push(row(number % PEOPLE, number / 60, float(number)), key=str(number))

    taken = measured(project, send)
    project.close()
    return taken


def kafka(root: Path, access: KeyAccess) -> list[float]:
    """Return the times of rows sent to a Kafka topic, in seconds. The consumer runs in another process."""
    broker = MockBroker()
    project = PushProject(root, access, view=kafka_view(broker.servers))
    context = multiprocessing.get_context("spawn")
    consumer = context.Process(target=stream, args=(str(root), access, broker.servers), daemon=True)
    broker.send("incomes", message(PEOPLE, 0, 1.0))
    consumer.start()
    project_ready = time.monotonic() + DEADLINE_S
    while project.amounts(PEOPLE, hour=ROWS / 60) != [1.0]:
        assert time.monotonic() < project_ready, "the consumer never came"
        time.sleep(0.01)
    taken = measured(
        project, lambda number: broker.send("incomes", message(number % PEOPLE, number / 60, float(number)))
    )
    consumer.kill()
    consumer.join()
    project.close()
    broker.close()
    return taken


def main() -> None:
    """Measure and write the results."""
    results = []
    with running_broker(*KEYS) as access, tempfile.TemporaryDirectory() as name:
        for case, measure in (("push", push), ("kafka", kafka)):
            root = Path(name) / case
            root.mkdir()
            taken = measure(root, access)
            value = float(np.percentile(taken, 99)) * 1000
            results.append(
                {"system": "falaj", "case": case, "metric": "p99_ms", "value": value, "unit": "ms"}
            )
            print(
                f"{case:6} p50 {statistics.median(taken) * 1000:.1f} ms, p99 {value:.1f} ms, of {ROWS} rows"
            )
    output = Path(".falaj/bench/freshness.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
