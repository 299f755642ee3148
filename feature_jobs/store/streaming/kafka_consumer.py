"""Reads a topic with librdkafka and hands what comes to a stream; offsets are the stream's, not Kafka's.

`consume` reads and stores in one process. A `PartitionReader` reads and checks some partitions for a committer that is
elsewhere, and keeps nothing that a new one from the committed offsets would not read again.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from confluent_kafka import Consumer, KafkaException, TopicPartition

from cluster.errors import CommitConflict, ConfigError, SourceError
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.pushed_rows import AT_ONCE
from feature_jobs.store.streaming.checked_messages import CheckedMessages, Message, checked
from feature_jobs.store.streaming.kafka_stream import KafkaStream

T = TypeVar("T")
ANSWER_S = 10.0
"""So long brokers may take for a question about the topic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What is read, and how."""

    source: KafkaSource
    properties_file: Path | None = None
    once: bool = False
    """End at what was the end at the start."""
    linger_s: float = 0.1
    max_rows: int = 50_000
    ahead: Ahead = AT_ONCE


def consume(
    stream: KafkaStream, reading: Reading, stopped: threading.Event, *, until_table: bool = False
) -> int:
    """Read until stopped or, if asked to, until the end or until there is a table; gives the rows taken.

    Raises:
        SourceError: the brokers or the topic cannot be reached.
        Fenced: a consumer that started later took over.
    """
    consumer = Consumer(properties(reading))
    try:
        until_committed(stream.start)
        offsets = stream.offsets(_partitions(consumer, reading))
        ends = _ends(consumer, reading, offsets) if reading.once else None
        consumer.assign(_places(reading, offsets))
        total = 0
        while not stopped.is_set() and not (until_table and stream.key_types) and is_left(offsets, ends):
            messages = _next(consumer, reading, offsets)
            if messages:
                total += until_committed(lambda taken=messages: stream.take(taken))  # type: ignore[misc]
        return total
    except KafkaException as error:
        raise SourceError(f"{reading.source.path} cannot be read: {error}.") from error
    finally:
        consumer.close()


def bounds(reading: Reading) -> dict[int, int]:
    """The partitions of a topic, with the offset where each ends now.

    Raises:
        SourceError: the brokers or the topic cannot be reached.
    """
    consumer = Consumer(properties(reading))
    try:
        return _ends(consumer, reading, _partitions(consumer, reading))
    except KafkaException as error:
        raise SourceError(f"{reading.source.path} cannot be read: {error}.") from error
    finally:
        consumer.close()


def is_left(offsets: Mapping[int, int], ends: Mapping[int, int] | None) -> bool:
    """Whether a partition is not read to its end yet; none has one where no ends are given."""
    return ends is None or any(offsets[number] < end for number, end in ends.items())


def shares(partitions: Sequence[int], readers: int) -> list[list[int]]:
    """Partitions dealt out in turn to at most so many readers, none of whom goes away empty-handed."""
    readers = min(readers, len(partitions))
    return [list(partitions[place::readers]) for place in range(readers)]


class PartitionReader:
    """Reads and checks some partitions and stores nothing, so that it may die at any time."""

    def __init__(
        self, reading: Reading, view: FeatureView, offsets: Mapping[int, int], key_types: Mapping[str, str]
    ) -> None:
        """Read on from the offsets; librdkafka is opened by the first `read`, whose errors come to the caller."""
        self._reading, self._view, self._key_types = reading, view, dict(key_types)
        self._offsets = dict(offsets)
        self._consumer: Consumer | None = None

    def read(self) -> CheckedMessages | None:
        """What came next, at most `max_rows`; none if nothing came within `linger_s`.

        Raises:
            SourceError: the brokers or the topic cannot be reached.
        """
        try:
            if self._consumer is None:
                self._consumer = Consumer(properties(self._reading))
                self._consumer.assign(_places(self._reading, self._offsets))
            starts = dict(self._offsets)
            messages = _next(self._consumer, self._reading, self._offsets)
        except KafkaException as error:
            raise SourceError(f"{self._reading.source.path} cannot be read: {error}.") from error
        if not messages:
            return None
        return checked(
            messages,
            self._view,
            key_types=self._key_types,
            now=dt.datetime.now(dt.UTC),
            ahead=self._reading.ahead,
            starts={number: start for number, start in starts.items() if self._offsets[number] > start},
        )


def properties(reading: Reading) -> dict[str, str | bool]:
    """librdkafka's, with those of the file.

    Raises:
        ConfigError: the file cannot be read, or has a line that is none.
    """
    given: dict[str, str | bool] = {}
    if reading.properties_file is not None:
        try:
            lines = reading.properties_file.read_text().splitlines()
        except OSError as error:
            raise ConfigError(
                f"kafka.properties_file {reading.properties_file}: {error.strerror}."
            ) from error
        for number, line in enumerate(lines, start=1):
            name, equals, value = line.partition("=")
            if line.strip() and not line.startswith("#"):
                if not equals:
                    raise ConfigError(
                        f"kafka.properties_file {reading.properties_file}, line {number} is no name=value."
                    )
                given[name.strip()] = value.strip()
    return given | {
        "bootstrap.servers": reading.source.bootstrap_servers,
        "group.id": f"falaj-{reading.source.topic}",  # asked for, but no group is joined
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "fetch.wait.max.ms": "50",
    }


def until_committed(work: Callable[[], T]) -> T:
    """Again as long as another job's commit comes between."""
    while True:
        try:
            return work()
        except CommitConflict:
            continue


def _partitions(consumer: Consumer, reading: Reading) -> list[int]:
    topic = reading.source.topic
    known = consumer.list_topics(topic, timeout=ANSWER_S).topics[topic]
    if known.error is not None:
        raise SourceError(f"{reading.source.path} cannot be read: {known.error.str()}.")
    return sorted(known.partitions)


def _places(reading: Reading, offsets: Mapping[int, int]) -> list[TopicPartition]:
    return [TopicPartition(reading.source.topic, number, offset) for number, offset in offsets.items()]


def _ends(consumer: Consumer, reading: Reading, partitions: Iterable[int]) -> dict[int, int]:
    places = {number: TopicPartition(reading.source.topic, number) for number in partitions}
    return {
        number: consumer.get_watermark_offsets(place, timeout=ANSWER_S)[1] for number, place in places.items()
    }


def _next(consumer: Consumer, reading: Reading, offsets: dict[int, int]) -> list[Message]:
    """The next messages; the offsets are moved behind them."""
    messages = consumer.consume(min(reading.max_rows, 10_000), timeout=reading.linger_s)
    for message in messages:
        partition, offset, error = message.partition(), message.offset(), message.error()
        if error is not None or partition is None or offset is None:
            raise SourceError(f"{reading.source.path} cannot be read: {error}.")
        offsets[partition] = offset + 1
    return messages  # type: ignore[return-value]  # those without a place were refused
