"""The incremental reader of an edge's access files, with SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.records.edge_counts.refusals import read_refusals
from cluster.statistics.breaker import is_open
from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.evidence import collecting
from serve_apps.rollout.evidence.collecting import OtherReader, Reader
from serve_apps.rollout.evidence.store import Counting, EvidenceStore, current_window
from serve_apps.rollout.evidence.tables import EVENTS, READERS, UNITS
from tests.samples.access_records import ROLLOUT_ID, line
from tests.samples.rollout_evidence import DAY, START, START_MS, Node, evidence, failures, the_plan


def test_a_unit_counts_once_in_a_window(ledger: Ledger, store: EvidenceStore, node: Node) -> None:
    """Whatever the number of its requests, retries and edges. Without a new line, a pass writes nothing."""
    node.write(
        line(status=500), line(status=500), line(unit_hash="B" * 16), line(arm="control", unit_hash="C" * 16)
    )
    assert node.reader.collect().records == 4
    other = Node(ledger, node.folder.with_name("other"), edge="two")
    other.write(line(status=500, ended_ms=START_MS + 5), line(arm="control", status=503, unit_hash="D" * 16))
    other.reader.collect()
    assert failures(store) == (1, 1)
    found = evidence(store)
    assert (found.watched_units, found.events[UnitEvent.failure].watched) == (2, 1)
    assert store.requests(ROLLOUT_ID) == {"treatment": 4, "control": 2}
    passes = stored_passes(node)
    assert node.reader.collect().records == 0
    assert stored_passes(node) == passes


def test_refused_requests_are_counted_once(ledger: Ledger, store: EvidenceStore, node: Node) -> None:
    """Those of all edges together, by hour. A reader that is killed before its commit counts nothing twice.

    Names of models that no route has, which any client can choose, get no row. Numbers of old hours are removed.
    """
    unrouted = {"status": 429, "rollout": "-", "arm": "-", "termination": "LR"}
    later = {"ended_ms": START_MS + 3_600_000}
    node.write(
        line(),
        line(status=422),
        line(**unrouted),
        line(**unrouted, model="no-such"),
        line(**unrouted, **later),
    )
    other = Node(ledger, node.folder.with_name("other"), edge="two")
    other.write(line(status=400, arm="control"))
    for one in (node, other):
        one.reader.collect()
        one.restart()
        one.reader.collect()
    node.write(line(**unrouted, **later))
    node.reader.collect()
    assert read_refusals(ledger.engine, "m") == {"2027-01-15T08": 3, "2027-01-15T09": 2}
    assert read_refusals(ledger.engine, "no-such") == {}
    node.write(line(**unrouted, ended_ms=START_MS + 71 * 86_400_000))
    node.reader.collect()
    assert read_refusals(ledger.engine, "m") == {"2027-03-27T08": 1}


def stored_passes(node: Node) -> list[int]:
    with node.engine.connect() as connection:
        return list(connection.execute(sa.select(READERS.c.passes).order_by(READERS.c.edge)).scalars())


def test_edges_that_count_the_same_units_at_once_do_not_block_each_other(
    ledger: Ledger, store: EvidenceStore, tmp_path: Path
) -> None:
    """Three edges saw the same units in different orders. No pass fails, and each unit counts once."""
    draw, units = random.Random(1), [f"{unit:016}" for unit in range(500)]
    nodes = [Node(ledger, tmp_path / name, edge=name) for name in ("one", "two", "three")]
    with ThreadPoolExecutor(len(nodes)) as threads:
        for turn in range(3):
            for node in nodes:
                draw.shuffle(units)
                node.write(*(line(status=500, unit_hash=unit, ended_ms=START_MS + turn) for unit in units))
            passes = [threads.submit(node.reader.collect) for node in nodes]
            assert [one.result().records for one in passes] == [500] * 3
    assert failures(store) == (500, 0)
    assert evidence(store).watched_units == 500
    assert store.requests(ROLLOUT_ID) == {"treatment": 4500}


def test_windows_end_with_the_step_and_after_a_day(store: EvidenceStore, node: Node) -> None:
    """In the next window, a unit counts again with its next event."""
    node.write(line(status=500))
    node.reader.collect()
    assert failures(store) == (1, 0)
    assert failures(store, after=DAY) == (0, 0)
    node.write(line(status=500, ended_ms=START_MS + 90_000_000))
    node.reader.collect()
    assert failures(store, after=1.1 * DAY) == (1, 0)
    second = {"step": 1, "step_started_at": START + 1.2 * DAY}
    assert failures(store, after=1.3 * DAY, **second) == (0, 0)
    node.write(line(status=500, below="5000", ended_ms=START_MS + 110_000_000))
    node.reader.collect()
    found = evidence(store, after=1.3 * DAY, **second)
    assert (found.window, found.events[UnitEvent.failure].treatment, found.watched_units) == (2, 1, 1)


def test_number_of_windows_is_bounded_by_the_plan() -> None:
    """The last one never ends."""
    last = the_plan().num_windows - 1
    for days, expected in ((0, 1), (1, 2), (1.9, 2), (last - 1, last), (last + 5, last)):
        window = current_window(
            the_plan(), step=1, step_started_at=START, started_at=START, now=START + days * DAY
        )
        assert (window.number, window.since) == (expected, START + (expected - 1) * DAY)


def test_a_unit_is_watched_after_its_time(store: EvidenceStore, node: Node) -> None:
    """A unit that has just come had no time to fail. Its first request at the step's weight counts."""
    watching = the_plan(unit_watch_s=60)
    node.write(
        line(ended_ms=START_MS + 30_000),
        line(status=500),
        line(unit_hash="B" * 16, ended_ms=START_MS + 50_000),
    )
    node.reader.collect()
    for after_s, units in ((59, 0), (61, 1), (111, 2)):
        found = evidence(store, plan=watching, after=dt.timedelta(seconds=after_s))
        assert (found.watched_units, found.events[UnitEvent.failure].watched) == (units, min(units, 1))
    node.write(
        line(below="5000", ended_ms=START_MS + 100_000), line(below="2000", ended_ms=START_MS + 99_000)
    )
    node.reader.collect()
    found = evidence(store, plan=watching, step=1, after=dt.timedelta(seconds=161))
    assert (found.watched_units, found.events[UnitEvent.failure].watched) == (1, 0)


def test_requests_without_a_rollout_or_of_another_one_are_not_counted(
    store: EvidenceStore, node: Node
) -> None:
    """A rollout that nobody registered has numbers of requests only; after `forget`, nothing is left."""
    node.write(line(status=500, rollout="none"), line(status=500, rollout="r2"), line(status=500, arm="none"))
    node.reader.collect()
    assert failures(store) == (0, 0)
    assert store.requests("r2") == {"treatment": 1}
    node.write(line(status=500))
    node.reader.collect()
    assert failures(store) == (1, 0)
    store.forget(ROLLOUT_ID)
    node.write(line(status=500, ended_ms=START_MS + 1))
    node.reader.collect()
    with node.engine.connect() as connection:
        for table in (EVENTS, UNITS):
            assert connection.execute(sa.select(table)).all() == []


def test_breaker_sees_the_last_requests(store: EvidenceStore, node: Node) -> None:
    """All of the treatment's last 20 failed while the champion answered."""
    node.write(*(line(status=500, unit_hash=f"{unit:016}") for unit in range(20)))
    node.reader.collect()
    assert not is_open(evidence(store).last)
    node.write(*(line(arm="outside", unit_hash="E" * 16) for _ in range(5)))
    node.restart()
    node.reader.collect()
    assert is_open(evidence(store).last)


def test_idle_time_is_that_of_the_arm_that_waits_longer(store: EvidenceStore, node: Node) -> None:
    """Without any request, it is the time since the start."""
    assert evidence(store).idle_s == 61
    node.write(line(ended_ms=START_MS + 20_000), line(arm="control", ended_ms=START_MS + 10_000))
    node.reader.collect()
    assert evidence(store).idle_s == 50


def test_slow_answers_count_by_the_registered_limit(store: EvidenceStore, node: Node) -> None:
    """Without a limit, only a client that gave up counts."""
    node.write(line(latency_ms=101), line(unit_hash="B" * 16, termination="CH", status=-1))
    node.reader.collect()
    assert evidence(store).events[UnitEvent.slow].treatment == 2
    store.register(ROLLOUT_ID, Counting())
    node.write(line(latency_ms=101, unit_hash="F" * 16))
    node.reader.collect()
    assert evidence(store).events[UnitEvent.slow].treatment == 2
    with pytest.raises(ValueError, match="slow_ms must be"):
        Counting(slow_ms=0)


def test_a_killed_reader_loses_nothing_and_counts_nothing_twice(
    store: EvidenceStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed at each of its statements; the next one continues from the stored position."""
    for total, name in enumerate(("_load", "_save", "add_events", "add_units"), start=1):
        node.write(line(status=500, unit_hash=f"{total:016}"), line(arm="control", unit_hash=f"{total:016}"))
        with monkeypatch.context() as patch:
            original = getattr(collecting, name)

            def die(*arguments: Any, original: Any = original) -> None:
                original(*arguments)
                raise KeyboardInterrupt

            patch.setattr(collecting, name, die)
            with pytest.raises(KeyboardInterrupt):
                node.reader.collect()
        node.restart()
        node.reader.collect()
        assert failures(store) == (total, 0)
        assert store.requests(ROLLOUT_ID) == {"treatment": total, "control": total}


def test_two_readers_of_one_edge_count_once(
    store: EvidenceStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one to store gets an error, also when nothing was stored before."""
    second = Reader(node.ledger_engine, node.folder, edge=node.edge, rotation=node.rotation)
    for number in (1, 2):
        node.write(line(status=500))
        with monkeypatch.context() as patch:
            original = collecting._save

            def save_after_the_other(*arguments: Any, original: Any = original) -> None:
                patch.setattr(collecting, "_save", original)
                raise sa.exc.OperationalError("", {}, RuntimeError())

            patch.setattr(collecting, "_save", save_after_the_other)
            with pytest.raises(sa.exc.OperationalError):
                second.collect()
        state = node.state()
        node.reader.collect()
        with pytest.raises(OtherReader), node.engine.connect() as connection:
            collecting._save(connection, node.edge, state, ())
        assert store.requests(ROLLOUT_ID) == {"treatment": number}
