"""Events that are pushed and streamed to an aggregated view.

Online values equal offline values at any instant. Every test runs on both engines.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings import OnlineConfig, OnlineKind
from feature_jobs.store.online.engine import Write
from feature_jobs.store.online.events import assign_sequence_online, merge_function, put_online
from feature_jobs.store.online.reader import FeatureReader
from feature_jobs.store.online.rows import Horizon, OnlineRow
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.online.window_rows import entity_states
from feature_jobs.store.online.window_states import stored_view
from feature_jobs.store.types.schema import PROVISIONAL
from tests.projects.online import online_keys, open_store
from tests.unit.feature_jobs.aggregation.event_frames import KEYS, SPEC, START, event_frames
from tests.unit.feature_jobs.online.test_windows import (
    EVENT,
    EVERYONE,
    SERVICE,
    TYPES,
    VIEW,
    frame_of,
    offline_columns,
)

AS_OF = START + timedelta(hours=12)
HOURS = (7, 9, 12, 15)
"""From one longest window before `AS_OF`."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[list[OnlineStore]]:
    folder = tmp_path_factory.mktemp("online")
    keys = online_keys(folder, "visits", "others")
    remote = OnlineConfig(kind=OnlineKind.redis, url=redis_url, prefix="events")
    with (
        contextlib.closing(open_store(folder, keys)) as lmdb,
        contextlib.closing(open_store(folder, keys, remote)) as redis,
    ):
        yield [lmdb, redis]


@pytest.fixture(params=[0, 1], ids=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, stores: list[OnlineStore]) -> OnlineStore:
    """Return the store after the view was materialised from an empty table."""
    stores[request.param].replace(stored_view(VIEW), TYPES, [])
    return stores[request.param]


@dataclass
class Pipeline:
    """A push log, a topic, a table and the online store. The rows come in order, some by push and some by topic."""

    store: OnlineStore
    rows: pl.DataFrame
    pushed: list[int] = field(default_factory=list)
    """Rows in the order of the log."""
    table: list[int] = field(default_factory=list)
    """Rows in the order of their `ingest_seq`."""
    num_finished: int = 0
    """Number of log rows that are in the table and have their final number online."""
    num_streamed: int = 0
    """Number of log rows that are in the table."""
    num_taken: int = 0
    """Number of rows that were pushed or read from the topic."""
    put: set[int] = field(default_factory=set)
    """Log numbers of the rows that were put online."""

    def numbered(self, rows: list[int], numbers: list[int]) -> pl.DataFrame:
        return self.rows[rows].with_columns(pl.Series("ingest_seq", numbers, pl.Int64))

    def next(self, count: int) -> list[int]:
        rows = list(range(self.num_taken, min(self.num_taken + count, self.rows.height)))
        self.num_taken += len(rows)
        return rows

    def push(self, count: int, *, lost: bool = False) -> None:
        """Append rows to the log, and put them online unless a crash comes before."""
        self.pushed += self.next(count)
        if not lost:
            self.push_again(count)

    def push_again(self, count: int) -> None:
        """Repeat the last pushes that the stream has not stored."""
        numbers = list(range(max(len(self.pushed) - count, self.num_finished), len(self.pushed)))
        self.put |= set(numbers)
        known = self.numbered([self.pushed[n] for n in numbers], [PROVISIONAL + n for n in numbers])
        put_online(self.store, VIEW, TYPES, known)

    def stream(self, *, finish: bool) -> None:
        """Store the log in the table and finish, unless a crash comes before. The next step then finishes."""
        self.finish()
        self.table += self.pushed[self.num_streamed :]
        self.num_streamed = len(self.pushed)
        if finish:
            self.finish()

    def finish(self) -> None:
        numbers = list(range(self.num_finished, self.num_streamed))
        rows = [self.pushed[n] for n in numbers]
        known = self.numbered(rows, [PROVISIONAL + n for n in numbers])
        assign_sequence_online(self.store, VIEW, TYPES, known, [self.table.index(row) for row in rows])
        self.num_finished = self.num_streamed

    def kafka(self, count: int) -> None:
        """Store rows of the topic in the table, then put them online."""
        rows = self.next(count)
        self.table += rows
        put_online(self.store, VIEW, TYPES, self.numbered(rows, [self.table.index(row) for row in rows]))

    def materialise(self, inside: Callable[[], None]) -> None:
        """Materialise the current table, while another step happens inside."""
        horizon = Horizon(len(self.table) - 1, self.num_streamed - 1)
        known = self.numbered(self.table, list(range(len(self.table))))

        def slow() -> Iterator[OnlineRow]:
            yield from entity_states(known, list(KEYS), SPEC, AS_OF)
            inside()

        self.store.replace(stored_view(VIEW), TYPES, slow(), horizon=horizon, merge=merge_function(VIEW))

    def offline(self) -> list[dict[str, list[object]]]:
        """Return the values at each hour from the table, the online rows and the log."""
        rows = self.table + [self.pushed[n] for n in sorted(self.put) if n >= self.num_streamed]
        known = self.numbered(rows, list(range(len(rows))))
        return [offline_columns(known, hour) for hour in HOURS]

    def online(self) -> list[dict[str, list[object]]]:
        """Return the values from the online store."""
        reader = FeatureReader(SERVICE, self.store)
        return [reader.read(EVERYONE, START + timedelta(hours=hour)).columns for hour in HOURS]


def run_step(run: Pipeline, step: str, count: int) -> None:
    """Run one step."""
    match step:
        case "p":
            run.push(count)
        case "l":
            run.push(count, lost=True)
        case "r":
            run.push_again(count)
        case "s":
            run.stream(finish=count > 2)
        case "c":
            run.kafka(count)


@settings(max_examples=max(settings.default.max_examples // 3, 1), deadline=None)
@given(frame=event_frames(min_size=20), seed=st.integers(0, 10**6))
def test_online_equals_offline_for_events_in_any_order(
    stores: list[OnlineStore], frame: pl.DataFrame, seed: int
) -> None:
    """Pushes, repetitions, crashes before any step, a topic, and materialisations in between."""
    # What is dated ahead may be forgotten too early (see `tiles`).
    known = pl.max_horizontal("event_timestamp", "created_timestamp")
    frame = frame.with_columns(known.alias("created_timestamp"))
    # Not a list drawn, as those are mostly short.
    draw = random.Random(seed)
    steps = [(draw.choice("pplrsscmm"), draw.randint(1, 4), draw.choice("plrsc")) for _ in range(12)]
    runs = [Pipeline(store, frame) for store in stores]
    for run in runs:
        run.store.replace(stored_view(VIEW), TYPES, [])
        for step, count, inside in steps:
            if step == "m":
                run.materialise(functools.partial(run_step, run, inside, count))
            else:
                run_step(run, step, count)
        run.finish()
    assert runs[0].online() == runs[1].online() == runs[0].offline()


def event(number: int, amount: float = 1.0) -> pl.DataFrame:
    """Push an event of one entity."""
    changed = {"event_id": pl.lit(str(number)), "amount": pl.lit(amount)}
    return frame_of(EVENT).with_columns(ingest_seq=pl.lit(PROVISIONAL + number, pl.Int64), **changed)


def count(store: OnlineStore) -> object:
    """Return the number of events of the entity."""
    vectors = FeatureReader(SERVICE, store).read([EVERYONE[0]], START + timedelta(hours=1))
    return vectors.columns["visits__count_2h"][0]


def test_concurrent_writers_lose_no_event(store: OnlineStore) -> None:
    """A writer whose state was changed by another one reads it again."""

    def push(start: int) -> None:
        for number in range(start, start + 10):
            put_online(store, VIEW, TYPES, event(number))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(push, (0, 100, 200)))
    assert count(store) == 30


def test_event_between_read_and_write_of_a_state_is_kept(
    store: OnlineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the first event of an entity nor a later one is lost."""
    put, waiting = store.engine.put, [1, 3]

    def slow(view: str, stamp: bytes, writes: list[Write]) -> int | None:
        if waiting and waiting[0] % 2:
            number = waiting.pop(0)
            put_online(store, VIEW, TYPES, event(number))
        return put(view, stamp, writes)

    monkeypatch.setattr(store.engine, "put", slow)
    put_online(store, VIEW, TYPES, event(0))
    put_online(store, VIEW, TYPES, event(2))
    assert count(store) == 4
