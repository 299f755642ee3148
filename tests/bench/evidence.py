"""`make bench BENCH=evidence`: the cost of counting access records, and the time from a request to its count.

Cases: `sqlite` and `postgresql`, with the records of an edge that answers 1,500 requests/s. `cpu_share` is CPU time of
the reader for a second of requests, without that of PostgreSQL. `count_ms` is the time from a line in the file until
the table has its unit. `look_ms` is the time of one `EvidenceStore.evidence` with 100,000 watched units.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.ledger import Ledger
from cluster.records.edge_counts.database import evidence_engine
from cluster.statistics.planning import Traffic, plan
from cluster.statistics.policy import EventGuardrail, Policy, Step, UnitEvent
from serve_apps.rollout.assignment import bounds
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import INTERVAL_S, Collector, Reader
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from serve_apps.rollout.evidence.tables import EVENTS, UNITS, add_events, add_units
from tests.samples.access_records import ROLLOUT_ID, line
from tests.servers.postgresql import is_installed, running_server

RATE, SECONDS, NUM_UNITS, LOOK_UNITS, PROBES = 1_500, 20, 100_000, 100_000, 20
WEIGHT = 20.0
BELOW = bounds(WEIGHT).treatment_below
SLOW_MS = 100.0
Figures = dict[str, tuple[float, str]]


def records(draw: random.Random, number: int) -> bytes:
    """Return lines of requests that end now: 20 % of each arm, 1 % failures, 2 % slow answers."""
    now_ms = int(time.time() * 1000)
    lines = []
    for _ in range(number):
        unit = draw.randrange(NUM_UNITS)
        share = unit / NUM_UNITS
        arm = "treatment" if share < 0.2 else "control" if share >= 0.8 else "outside"
        status = 500 if draw.random() < 0.01 else 200
        latency = 150 if draw.random() < 0.02 else 3
        lines.append(
            line(
                arm=arm,
                unit_hash=f"{unit:016X}",
                status=status,
                latency_ms=latency,
                ended_ms=now_ms,
                below=str(BELOW),
            )
        )
    return b"".join(lines)


def passes(reader: Reader, file: Path) -> Figures:
    """Read 20 seconds of requests in passes of half a second."""
    draw, cpu, walls = random.Random(1), 0.0, []
    for _ in range(round(SECONDS / INTERVAL_S)):
        with file.open("ab") as sink:
            sink.write(records(draw, round(RATE * INTERVAL_S)))
        started, cpu_started = time.perf_counter(), time.process_time()
        reader.collect()
        cpu += time.process_time() - cpu_started
        walls.append((time.perf_counter() - started) * 1000)
    return {
        "cpu_share": (cpu / SECONDS, "of a core"),
        "pass_p50_ms": (statistics.median(walls), "ms"),
        "pass_p99_ms": (statistics.quantiles(walls, n=100)[98], "ms"),
    }


def delays(engine: sa.Engine, reader: Reader, file: Path) -> Figures:
    """Write lines of new failing units at random times, and wait until the table has them."""
    draw, found = random.Random(2), []
    with Collector(reader).running(), engine.connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        for number in range(PROBES):
            threading.Event().wait(draw.random() * INTERVAL_S)
            unit = f"F{number:015X}"
            with file.open("ab") as sink:
                sink.write(
                    line(status=500, unit_hash=unit, ended_ms=int(time.time() * 1000), below=str(BELOW))
                )
            started = time.perf_counter()
            while connection.execute(sa.select(EVENTS).where(EVENTS.c.unit == unit)).first() is None:
                threading.Event().wait(0.002)
            found.append((time.perf_counter() - started) * 1000)
    return {"count_p50_ms": (statistics.median(found), "ms"), "count_max_ms": (max(found), "ms")}


def looks(engine: sa.Engine, store: EvidenceStore) -> Figures:
    """Look at a rollout of many units, of which 3 % had an event."""
    now = dt.datetime.now(dt.UTC)
    now_ms = int(now.timestamp() * 1000)
    with engine.begin() as connection:
        names = [f"{unit:016X}" for unit in range(LOOK_UNITS)]
        add_units(connection, {("look", name): (BELOW, now_ms) for name in names})
        add_events(
            connection,
            {
                ("look", UnitEvent.failure, name): ("treatment", BELOW, now_ms)
                for name in names[: LOOK_UNITS // 33]
            },
        )
    policy = Policy(
        steps=(Step(weight=WEIGHT),),
        event_guardrails=(EventGuardrail(event=UnitEvent.failure, limit=0.2),),
        deadline_s=86_400,
    )
    the_plan = plan(policy, Traffic(units_per_hour=100_000, events={UnitEvent.failure: 0.01}))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        evidence = store.evidence(
            "look", the_plan, step=0, step_started_at=now, started_at=now, now=now + dt.timedelta(seconds=1)
        )
        times.append((time.perf_counter() - started) * 1000)
    assert evidence.watched_units == LOOK_UNITS
    return {"look_p50_ms": (statistics.median(times), "ms")}


def measure(url: str) -> Iterator[tuple[str, tuple[float, str]]]:
    """Yield all figures with one database."""
    with contextlib.closing(Ledger(url)) as ledger, tempfile.TemporaryDirectory() as folder:
        store = EvidenceStore(ledger.engine)
        store.register(ROLLOUT_ID, Counting(slow_ms=SLOW_MS))
        reader = Reader(ledger.engine, Path(folder), edge="one", rotation=Rotation())
        file = Path(folder) / "20270115T080000-a.jsonl"
        yield from passes(reader, file).items()
        engine = evidence_engine(ledger.engine)
        with engine.connect() as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(UNITS)).scalar_one() > 0
        yield from delays(engine, reader, file).items()
        yield from looks(engine, store).items()


def main() -> None:
    """Measure with each database, and write the figures."""
    rows = []
    with contextlib.ExitStack() as stack:
        urls = {"sqlite": f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory())}/ledger.db"}
        if is_installed():
            urls["postgresql"] = stack.enter_context(running_server())
        else:
            print("PostgreSQL is not installed, so only SQLite is measured.")
        for case, url in urls.items():
            for metric, (value, unit) in measure(url):
                print(f"{case:12} {metric:14} {value:10.4g} {unit}", flush=True)
                rows.append({"system": "falaj", "case": case, "metric": metric, "value": value, "unit": unit})
    out = Path(".falaj/bench/evidence.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
