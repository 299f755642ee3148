"""The incremental reader of an edge's access files, with SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.statistics.breaker import is_open
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan, Traffic, plan
from cluster.statistics.policy import EventGuardrail, Policy, Step, UnitEvent
from serve_apps.rollout.evidence import collecting
from serve_apps.rollout.evidence.access_files import Rotation, new_file
from serve_apps.rollout.evidence.collecting import OtherReader, Reader
from serve_apps.rollout.evidence.store import Counting, EvidenceStore, current_window
from serve_apps.rollout.evidence.tables import EVENTS, READERS, UNITS, evidence_engine
from tests.samples.access_records import GOOD, ROLLOUT_ID, line
from tests.servers.postgresql import new_database, running_server
from tests.servers.small_disk import fill_disk, mounted_small_disk

START = dt.datetime.fromtimestamp(GOOD["ended_ms"] / 1000, dt.UTC)
START_MS = GOOD["ended_ms"]
DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as address:
        yield address


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "sqlite":
        opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    else:
        opened = Ledger(new_database(request.getfixturevalue("server"), secrets.token_hex(4)))
    yield opened
    opened.close()


@pytest.fixture
def store(ledger: Ledger) -> EvidenceStore:
    opened = EvidenceStore(ledger.engine)
    opened.register(ROLLOUT_ID, Counting(slow_ms=100))
    return opened


class Node:
    """The access files of one edge, and their reader."""

    def __init__(
        self, ledger: Ledger, folder: Path, *, edge: str = "one", rotation: Rotation | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.engine, self.folder, self.edge = evidence_engine(ledger.engine), folder, edge
        self.ledger_engine = ledger.engine
        self.rotation = rotation or Rotation()
        self.restart()

    def restart(self) -> None:
        """Replace the reader, as after kill -9."""
        self.reader = Reader(self.ledger_engine, self.folder, edge=self.edge, rotation=self.rotation)

    def write(self, *lines: bytes, name: str = "20270115T080000-a.jsonl") -> None:
        with (self.folder / name).open("ab") as file:
            file.write(b"".join(lines))


@pytest.fixture
def node(ledger: Ledger, tmp_path: Path) -> Node:
    return Node(ledger, tmp_path / "access")


def the_plan(*, unit_watch_s: float = 0.0) -> Plan:
    policy = Policy(
        steps=(Step(weight=20), Step(weight=50)),
        event_guardrails=(EventGuardrail(event=UnitEvent.failure, limit=0.2),),
        deadline_s=3 * 86_400,
        unit_watch_s=unit_watch_s,
    )
    return plan(policy, Traffic(units_per_hour=10_000, events={UnitEvent.failure: 0.01}))


def evidence(
    store: EvidenceStore, *, after: dt.timedelta = dt.timedelta(minutes=1), step: int = 0, **changes: Any
) -> Evidence:
    """Return the evidence of the sample's rollout, so long after its start."""
    times = {
        "step_started_at": START - dt.timedelta(seconds=1),
        "started_at": START - dt.timedelta(seconds=1),
    }
    arguments = times | changes
    return store.evidence(
        ROLLOUT_ID, arguments.pop("plan", the_plan()), step=step, now=START + after, **arguments
    )


def failures(store: EvidenceStore, **options: Any) -> tuple[int, int]:
    counts = evidence(store, **options).events[UnitEvent.failure]
    return counts.treatment, counts.control


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


def stored_passes(node: Node) -> list[int]:
    with node.engine.connect() as connection:
        return list(connection.execute(sa.select(READERS.c.passes).order_by(READERS.c.edge)).scalars())


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
        state = _loaded(node)
        node.reader.collect()
        with pytest.raises(OtherReader), node.engine.connect() as connection:
            collecting._save(connection, node.edge, state, ())
        assert store.requests(ROLLOUT_ID) == {"treatment": number}


def _loaded(node: Node) -> Any:
    with node.engine.connect() as connection:
        return collecting._load(connection, node.edge)


def test_a_line_is_read_when_it_is_complete(store: EvidenceStore, node: Node) -> None:
    """While HAProxy holds the file, the rest of a line may come. After its end, a cut line is broken."""
    text = line(status=500)
    with new_file(node.folder) as file:
        file.write(text[:50])
        file.flush()
        assert node.reader.collect().records == 0
        file.write(text[50:] + b'{"cut')
        file.flush()
        collected = node.reader.collect()
        assert (collected.records, collected.broken) == (1, 0)
    collected = node.reader.collect()
    assert (collected.records, collected.broken, collected.behind_bytes) == (0, 1, 0)
    assert failures(store) == (1, 0)


def test_broken_lines_are_counted_and_the_rest_is_read(store: EvidenceStore, node: Node) -> None:
    """Such as those that a full disk cuts. A huge line without an end does not stop the reader."""
    node.write(line(status=500)[:70], line(), b"\xff\xfe\n", line(status=500))
    collected = node.reader.collect()
    assert (collected.records, collected.broken) == (1, 2)
    node.write(b"x" * 20_000, b"\n", line(status=500, unit_hash="B" * 16))
    assert [node.reader.collect(max_bytes=10_000).broken for _ in range(4)] == [1, 1, 1, 0]
    assert failures(store) == (2, 0)


def test_a_pass_reads_a_bounded_number_of_bytes(store: EvidenceStore, node: Node) -> None:
    """The next passes read the rest, in all files."""
    for name in ("20270115T080000-a.jsonl", "20270116T080000-b.jsonl"):
        node.write(*(line(unit_hash=f"{name[7]}{unit:015}") for unit in range(50)), name=name)
    size = len(line())
    numbers = [node.reader.collect(max_bytes=20 * size + 7).records for _ in range(8)]
    assert (numbers[0], sum(numbers), numbers[-1]) == (20, 100, 0)
    assert evidence(store).watched_units == 100


def test_the_newest_records_do_not_wait_for_a_backlog(store: EvidenceStore, node: Node) -> None:
    """Such as after an outage of the database. The breaker still sees the last requests, and the champion's since."""
    backlog = [line(status=500, unit_hash=f"{unit:016}", ended_ms=START_MS + unit) for unit in range(50)]
    node.write(*backlog, line(arm="control", ended_ms=START_MS), name="20270115T080000-a.jsonl")
    newest = [line(unit_hash=f"N{unit:015}", ended_ms=START_MS + 9_000) for unit in range(20)]
    node.write(*newest, name="20270116T080000-b.jsonl")
    size = sum(map(len, newest))
    assert node.reader.collect(max_bytes=size).records == 20
    before = evidence(store).last
    while node.reader.collect(max_bytes=size).records:
        pass
    assert failures(store) == (50, 0)
    assert evidence(store).last == before
    assert (before.requests, before.failures, before.champion_requests) == (20, 0, 0)


def test_known_units_are_bounded(store: EvidenceStore, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that was forgotten is stored again, which changes nothing."""
    monkeypatch.setattr(collecting, "MAX_KNOWN", 5)
    for number in range(3):
        node.write(*(line(unit_hash=f"{unit:016}", ended_ms=START_MS + number) for unit in range(20)))
        node.reader.collect()
    assert len(node.reader._known._below) == 5
    assert evidence(store).watched_units == 20


def test_files_are_removed_when_they_were_counted_and_are_old(ledger: Ledger, tmp_path: Path) -> None:
    """Neither a file that was not read to its end, nor one of a running HAProxy, nor a young one is removed."""
    node = Node(ledger, tmp_path / "access", rotation=Rotation(retention_s=3600))
    names = ["20270115T080000-a.jsonl", "20270116T080000-b.jsonl", "20270117T080000-c.jsonl"]
    for name in names:
        node.write(line(), line(), name=name)
    old = time.time() - 7200
    for name in names[:2]:
        os.utime(node.folder / name, (old, old))
    with new_file(node.folder) as running:
        running.write(line())
        running.flush()
        os.utime(running.name, (old, old))
        assert [node.reader.collect(max_bytes=1).removed for _ in range(2)] == [(), ()]
        assert node.reader.collect().removed == ()
        assert node.reader.collect().removed == (names[0], names[1])
        assert node.reader.collect().removed == ()
        left = {path.name for path in node.folder.iterdir()}
        assert left == {names[2], Path(running.name).name}
    assert set(_loaded(node).files) == left
    (node.folder / names[2]).rename(tmp_path / "moved.jsonl")
    node.reader.collect()
    assert names[2] not in _loaded(node).files


def test_full_disk_loses_no_count(tmp_path: Path) -> None:
    """While the database cannot be written, records stay in their files; they are counted later."""
    with mounted_small_disk(tmp_path / "disk") as disk:
        ledger = Ledger(f"sqlite:///{disk}/ledger.db")
        store = EvidenceStore(ledger.engine)
        store.register(ROLLOUT_ID, Counting())
        node = Node(ledger, tmp_path / "access")
        node.write(*(line(status=500, unit_hash=f"{unit:016}") for unit in range(20_000)))
        fill_disk(disk / "rest")
        with pytest.raises(sa.exc.DBAPIError):
            node.reader.collect(max_bytes=2**24)
        (disk / "rest").unlink()
        node.reader.collect(max_bytes=2**24)
        assert failures(store) == (20_000, 0)
        ledger.close()
