"""Reads a topic with librdkafka and hands what comes to a stream; offsets are the stream's, not Kafka's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from confluent_kafka import Consumer, KafkaException, TopicPartition

from cluster.errors import CommitConflict, ConfigError, SourceError
from feature_jobs.store.kafka_source import KafkaSource
from feature_jobs.store.kafka_stream import KafkaStream

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


def consume(stream: KafkaStream, reading: Reading, stopped: threading.Event) -> int:
    """Read until stopped or, if asked to, until the end; gives the rows taken.

    Raises:
        SourceError: the brokers or the topic cannot be reached.
        Fenced: a consumer that started later took over.
    """
    consumer = Consumer(properties(reading))
    try:
        _until_committed(stream.start)
        return _read(consumer, stream, reading, stopped)
    except KafkaException as error:
        raise SourceError(f"{reading.source.path} cannot be read: {error}.") from error
    finally:
        consumer.close()


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


def _read(consumer: Consumer, stream: KafkaStream, reading: Reading, stopped: threading.Event) -> int:
    topic = reading.source.topic
    known = consumer.list_topics(topic, timeout=ANSWER_S).topics[topic]
    if known.error is not None:
        raise SourceError(f"{reading.source.path} cannot be read: {known.error.str()}.")
    offsets = stream.offsets(sorted(known.partitions))
    consumer.assign([TopicPartition(topic, number, offset) for number, offset in offsets.items()])
    ends = _ends(consumer, topic, offsets) if reading.once else None
    total = 0
    while not stopped.is_set() and (ends is None or any(offsets[one] < end for one, end in ends.items())):
        messages = consumer.consume(min(reading.max_rows, 10_000), timeout=reading.linger_s)
        for message in messages:
            partition, offset, error = message.partition(), message.offset(), message.error()
            if error is not None or partition is None or offset is None:
                raise SourceError(f"{reading.source.path} cannot be read: {error}.")
            offsets[partition] = offset + 1
        if messages:
            total += _until_committed(lambda taken=messages: stream.take(taken))  # type: ignore[misc]
    return total


def _ends(consumer: Consumer, topic: str, partitions: dict[int, int]) -> dict[int, int]:
    return {
        number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=ANSWER_S)[1]
        for number in partitions
    }


def _until_committed(work: Callable[[], T]) -> T:
    """Again as long as another job's commit comes between."""
    while True:
        try:
            return work()
        except CommitConflict:
            continue
