"""Several readers of a topic and one committer, without Ray."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, Inconsistent
from feature_jobs.store.ingestion.pushed_rows import POSITION
from feature_jobs.store.streaming.checked_messages import CheckedMessages, combine, to_checked
from feature_jobs.store.streaming.kafka_consumer import (
    ConsumerSettings,
    PartitionReader,
    consume,
    distribute_partitions,
    end_offsets,
    has_remaining,
)
from feature_jobs.store.streaming.kafka_stream import Fenced, KafkaStream
from feature_jobs.store.streaming.lateness import Lateness, LatePolicy
from tests.projects.push import PushProject, Sent, kafka_view, message
from tests.servers.kafka_broker import MockBroker
from tests.unit.feature_jobs.streaming.push_kills import require_same_results

TOPIC, KEYS = "incomes", {"person_id": "int64"}
VIEW = kafka_view("a:1")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


VALUES = st.sampled_from([b"nonsense", orjson.dumps(message(1, 1, 5.0)), orjson.dumps(message(2, 2, -5.0))])


@st.composite
def topics(draw: st.DrawFn) -> list[Sent]:
    """Draw messages of three partitions."""
    ends = [0, 0, 0]
    sent = []
    for partition, value in draw(st.lists(st.tuples(st.integers(0, 2), VALUES), max_size=8)):
        sent.append(Sent((partition, ends[partition]), value))
        ends[partition] += 1
    return sent


def check(messages: list[Sent], **options: Any) -> CheckedMessages:
    return to_checked(messages, VIEW, key_types=KEYS, now=NOW, **options)


def results(messages: CheckedMessages) -> dict[tuple[int, int], Any]:
    """Return the stored amount or the reason for quarantine, by partition and offset."""
    positions = list(zip(messages.partitions.tolist(), messages.offsets.tolist(), strict=True))
    good = messages.rows.good
    amounts = good["amount"].to_pylist() if good.num_rows else []
    result_of = dict(zip(good[POSITION].to_pylist(), amounts, strict=True))
    bad = messages.rows.bad
    result_of |= dict(zip(bad[POSITION].to_pylist(), bad["reason"].to_pylist(), strict=True))
    assert result_of.keys() == set(range(len(positions)))
    return {positions[index]: result_of[index] for index in result_of}


@given(topics(), st.integers(1, 3))
def test_combined_parts_equal_the_result_of_one_reader(messages: list[Sent], readers: int) -> None:
    """Every row, reason and value stays with its message."""
    parts = [
        check([message for message in messages if message.partition() in share])
        for share in distribute_partitions([0, 1, 2], readers)
    ]
    combined = combine(parts)
    assert results(combined) == results(check(messages))
    values = dict(
        zip(zip(combined.partitions, combined.offsets, strict=True), combined.values.to_pylist(), strict=True)
    )
    assert values == {message.position: message.value() for message in messages}


@given(topics(), st.lists(st.integers(-1, 8), min_size=3, max_size=3))
def test_messages_in_the_table_are_skipped(messages: list[Sent], committed: list[int]) -> None:
    """The result is the same as if these messages had not been read."""
    fresh = check(messages).after(dict(enumerate(committed)))
    remaining = [message for message in messages if message.offset() > committed[message.partition()]]
    assert results(fresh) == results(check(remaining))
    assert fresh.last_offsets == check(remaining).last_offsets


def test_messages_that_would_leave_a_gap_are_refused() -> None:
    """The table has a partition up to an offset, but it was read from a later one."""
    messages = check([Sent((0, 7), b"nonsense")], starts={0: 7})
    assert len(messages.after({0: 6})) == 1
    with pytest.raises(Inconsistent, match="from offset 7, but the table has it only up to 5"):
        messages.after({0: 5})


@given(st.lists(st.integers(0, 50), unique=True, min_size=1), st.integers(1, 9))
def test_each_partition_has_one_reader(partitions: list[int], readers: int) -> None:
    """The readers' numbers of partitions differ by at most one, and each reader has at least one."""
    dealt = distribute_partitions(partitions, readers)
    assert sorted(number for share in dealt for number in share) == sorted(partitions)
    sizes = [len(share) for share in dealt]
    assert len(dealt) <= readers
    assert 0 < min(sizes) <= max(sizes) <= min(sizes) + 1


def test_first_row_ends_the_start_without_a_table(
    open_project: Callable[..., PushProject], broker: MockBroker
) -> None:
    """The first row decides the key types. After a restart the table has them."""
    project = open_project(kafka_view(broker.servers))
    broker.send(TOPIC, b"nonsense", message(1, 1), message(2, 1))
    reading = ConsumerSettings(source=project.topic, linger_s=0.01, max_rows=1)
    stream, never = project.kafka(), threading.Event()
    assert stream.key_types == {}
    assert consume(stream, reading, never, until_table=True) == 2
    assert stream.key_types == KEYS
    assert consume(project.kafka(), reading, never, until_table=True) == 0


def test_killed_readers_lose_and_duplicate_no_rows(
    open_project: Callable[..., PushProject], broker: MockBroker
) -> None:
    """Table, quarantine, lateness and online rows equal those of one reader."""
    draw = random.Random(1)
    for number in range(60):
        person, partition = draw.randrange(4), number % 3
        row = message(person, draw.randrange(20), draw.choice([1.0, -1.0, draw.random()]))
        broker.send(TOPIC, row if draw.random() < 0.9 else b"nonsense", partition=partition)
    lateness = Lateness(3_600_000_000, LatePolicy.quarantine)
    single, apart = (open_project(kafka_view(broker.servers), folder=name) for name in ("single", "apart"))
    single.consume(lateness=lateness)
    first = apart.kafka(lateness=lateness)
    reading = ConsumerSettings(source=apart.topic, linger_s=0.01, max_rows=4, once=True)
    total = consume(first, reading, threading.Event(), until_table=True)
    assert total + read_with_kills(apart.kafka(lateness=lateness), reading, draw) == 60
    columns = ["person_id", "event_timestamp", "amount", "sector"]
    expected, actual = (one.table().select(columns).sort(pl.all()) for one in (single, apart))
    assert actual.equals(expected)
    assert apart.table()["ingest_seq"].is_unique().all()
    require_same_results(apart, single)
    with pytest.raises(Fenced, match="started later"):
        first.store_checked(check([Sent((0, 0), b"nonsense")], starts={0: 0}))


def read_with_kills(stream: KafkaStream, reading: ConsumerSettings, draw: random.Random) -> int:
    """Read with two readers, and sometimes drop one with its messages; return the number of rows taken."""
    stream.start()
    ends, total = end_offsets(reading), 0
    dealt = distribute_partitions(list(ends), 2)

    def start(share: list[int]) -> PartitionReader:
        return PartitionReader(reading, stream.view.view, stream.offsets(share), stream.key_types)

    readers = [start(share) for share in dealt]
    while has_remaining(stream.offsets(list(ends)), ends):
        given = [reader.read() for reader in readers]
        if draw.random() < 0.3:
            dead = draw.randrange(2)
            given[dead], readers[dead] = None, start(dealt[dead])
        if parts := [one for one in given if one is not None]:
            taken = combine(parts)
            total += stream.store_checked(taken)
            assert stream.store_checked(taken) == 0, "the table has them already"
    return total


def test_reader_names_a_missing_file(tmp_path: Path) -> None:
    """The first read raises the error, so that the reader's owner gets it."""
    missing = ConsumerSettings(source=VIEW.source, properties_file=tmp_path / "none")  # type: ignore[arg-type]
    reader = PartitionReader(missing, VIEW, {0: 0}, KEYS)
    with pytest.raises(ConfigError, match="none cannot be read: No such file"):
        reader.read()
