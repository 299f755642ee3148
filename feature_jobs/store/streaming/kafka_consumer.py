"""Read a topic with librdkafka and pass the messages to a stream. The stream stores the offsets, not Kafka.

`consume` reads and stores in one process. A `PartitionReader` reads and checks some partitions for a committer in
another process. Its state can be lost: a new reader starts at the committed offsets and reads the same messages again.
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
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.pushed_rows import ONLINE_FUTURE_LIMIT
from feature_jobs.store.streaming.checked_messages import CheckedMessages, Message, to_checked
from feature_jobs.store.streaming.kafka_stream import KafkaStream
from feature_jobs.store.streaming.micro_batches import MAX_ROWS

T = TypeVar("T")
ANSWER_S = 10.0
"""Timeout in seconds for a broker's answer about the topic."""
CODE_PROPERTIES = ("plugin.library.paths", "ssl.engine.", "ssl.providers", "sasl.kerberos.", "interceptors")
"""Properties, or beginnings of their names, with which librdkafka loads a library or, for Kerberos, runs a shell
command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsumerSettings:
    """What a consumer reads, and how."""

    source: KafkaSource
    properties_file: Path | None = None
    """File with librdkafka properties, one `name=value` per line."""
    once: bool = False
    """Whether to stop at the end that the topic had at the start."""
    linger_s: float = 0.1
    """Longest wait in seconds for a batch of messages."""
    max_rows: int = MAX_ROWS
    """Maximum number of messages in a batch."""
    ahead: FutureLimit = ONLINE_FUTURE_LIMIT
    """How far a row's times may be ahead of the clock."""


def consume(
    stream: KafkaStream, reading: ConsumerSettings, stopped: threading.Event, *, until_table: bool = False
) -> int:
    """Read and store messages until stopped; return the number of stored messages.

    Args:
        stream: stores the messages.
        reading: what to read. With `once`, stop at the end.
        stopped: the caller sets it to stop.
        until_table: whether to stop as soon as the table exists.

    Raises:
        SourceError: the brokers or the topic cannot be reached.
        Fenced: a consumer that started later took over.
    """
    consumer = Consumer(librdkafka_properties(reading))
    try:
        retry_on_conflict(stream.start)
        offsets = stream.offsets(_partitions(consumer, reading))
        ends = _ends(consumer, reading, offsets) if reading.once else None
        consumer.assign(_topic_partitions(reading, offsets))
        total = 0
        while (
            not stopped.is_set() and not (until_table and stream.key_types) and has_remaining(offsets, ends)
        ):
            messages = _next_messages(consumer, reading, offsets)
            if messages:
                total += retry_on_conflict(lambda batch=messages: stream.store_messages(batch))  # type: ignore[misc]
        return total
    except KafkaException as error:
        raise SourceError(f"{reading.source.path} cannot be read: {error}.") from error
    finally:
        consumer.close()


def end_offsets(reading: ConsumerSettings) -> dict[int, int]:
    """Return the current end offset of each partition of a topic.

    Raises:
        SourceError: the brokers or the topic cannot be reached.
    """
    consumer = Consumer(librdkafka_properties(reading))
    try:
        return _ends(consumer, reading, _partitions(consumer, reading))
    except KafkaException as error:
        raise SourceError(f"{reading.source.path} cannot be read: {error}.") from error
    finally:
        consumer.close()


def has_remaining(offsets: Mapping[int, int], ends: Mapping[int, int] | None) -> bool:
    """Return whether a partition is not read to its end yet; always true without ends."""
    return ends is None or any(offsets[number] < end for number, end in ends.items())


def distribute_partitions(partitions: Sequence[int], readers: int) -> list[list[int]]:
    """Distribute partitions in turn among at most `readers` readers, each of which gets at least one."""
    readers = min(readers, len(partitions))
    return [list(partitions[first::readers]) for first in range(readers)]


class PartitionReader:
    """Reads and checks some partitions. It stores nothing, so it may be killed at any time."""

    def __init__(
        self,
        reading: ConsumerSettings,
        view: FeatureView,
        offsets: Mapping[int, int],
        key_types: Mapping[str, str],
    ) -> None:
        """Prepare to read from the offsets. The first `read` starts librdkafka, so that `read` raises its errors."""
        self._reading, self._view, self._key_types = reading, view, dict(key_types)
        self._offsets = dict(offsets)
        self._consumer: Consumer | None = None

    def read(self) -> CheckedMessages | None:
        """Return the next messages, at most `max_rows`; None if there are none within `linger_s`.

        Raises:
            SourceError: the brokers or the topic cannot be reached.
        """
        try:
            if self._consumer is None:
                self._consumer = Consumer(librdkafka_properties(self._reading))
                self._consumer.assign(_topic_partitions(self._reading, self._offsets))
            starts = dict(self._offsets)
            messages = _next_messages(self._consumer, self._reading, self._offsets)
        except KafkaException as error:
            raise SourceError(f"{self._reading.source.path} cannot be read: {error}.") from error
        if not messages:
            return None
        return to_checked(
            messages,
            self._view,
            key_types=self._key_types,
            now=dt.datetime.now(dt.UTC),
            ahead=self._reading.ahead,
            starts={number: start for number, start in starts.items() if self._offsets[number] > start},
        )


def librdkafka_properties(reading: ConsumerSettings) -> dict[str, str | bool]:
    """Return the properties for librdkafka: the properties in the file, and those that the platform needs.

    Raises:
        ConfigError: the file cannot be read, a line is not `name=value`, or a property could run code.
    """
    configured: dict[str, str | bool] = {}
    if reading.properties_file is not None:
        try:
            lines = reading.properties_file.read_text().splitlines()
        except OSError as error:
            raise ConfigError(
                f"kafka.properties_file {reading.properties_file} cannot be read: {error.strerror}."
            ) from error
        for number, line in enumerate(lines, start=1):
            name, equals, value = line.partition("=")
            if line.strip() and not line.startswith("#"):
                if not equals:
                    raise ConfigError(
                        f"kafka.properties_file {reading.properties_file}, line {number} is not name=value."
                    )
                if name.strip().startswith(CODE_PROPERTIES):
                    raise ConfigError(
                        f"kafka.properties_file {reading.properties_file}, line {number}: {name.strip()} could load a "
                        "library or run a command, so it is not allowed. Remove the line. To log in, use "
                        "sasl.mechanism PLAIN, SCRAM-SHA-512 or OAUTHBEARER, or a client certificate."
                    )
                configured[name.strip()] = value.strip()
    return configured | {
        "bootstrap.servers": reading.source.bootstrap_servers,
        "group.id": f"falaj-{reading.source.topic}",  # librdkafka requires it, but no group is joined
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "fetch.wait.max.ms": "50",
    }


def retry_on_conflict(work: Callable[[], T]) -> T:
    """Run `work`, and run it again for as long as another job's commit conflicts with it."""
    while True:
        try:
            return work()
        except CommitConflict:
            continue


def _partitions(consumer: Consumer, reading: ConsumerSettings) -> list[int]:
    topic = reading.source.topic
    metadata = consumer.list_topics(topic, timeout=ANSWER_S).topics[topic]
    if metadata.error is not None:
        raise SourceError(f"{reading.source.path} cannot be read: {metadata.error.str()}.")
    return sorted(metadata.partitions)


def _topic_partitions(reading: ConsumerSettings, offsets: Mapping[int, int]) -> list[TopicPartition]:
    return [TopicPartition(reading.source.topic, number, offset) for number, offset in offsets.items()]


def _ends(consumer: Consumer, reading: ConsumerSettings, partitions: Iterable[int]) -> dict[int, int]:
    ends = {}
    for number in partitions:
        partition = TopicPartition(reading.source.topic, number)
        _, ends[number] = consumer.get_watermark_offsets(partition, timeout=ANSWER_S)
    return ends


def _next_messages(consumer: Consumer, reading: ConsumerSettings, offsets: dict[int, int]) -> list[Message]:
    """Return the next messages and set `offsets` to the positions after them."""
    messages = consumer.consume(min(reading.max_rows, 10_000), timeout=reading.linger_s)
    for message in messages:
        partition, offset, error = message.partition(), message.offset(), message.error()
        if error is not None or partition is None or offset is None:
            raise SourceError(f"{reading.source.path} cannot be read: {error}.")
        offsets[partition] = offset + 1
    return messages  # type: ignore[return-value]  # all of them have a partition and an offset
