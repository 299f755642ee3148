"""Read and check a Kafka topic with several Ray actors, and commit in the driver.

Each actor reads, transforms and checks the messages of its partitions. The driver assigns sequence numbers and commits
the results of all actors as one batch. Delta accepts only one commit at a time, so commits are not distributed. So
several actors are faster only if a transform is slow. Offsets, fencing and recovery work in the same way as with a
single process. If an actor dies, a new one starts at the committed offsets.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.placement import Selector, options
from cluster.session import refusal_behind
from feature_jobs.store.streaming.checked_messages import CheckedMessages, combine
from feature_jobs.store.streaming.kafka_consumer import (
    ConsumerSettings,
    PartitionReader,
    consume,
    distribute_partitions,
    end_offsets,
    has_remaining,
    retry_on_conflict,
)
from feature_jobs.store.streaming.kafka_stream import KafkaStream

MAX_DEATHS = 3
"""How often one consumer may die without a result in between. After one more death, the command fails."""


def consume_apart(
    stream: KafkaStream,
    reading: ConsumerSettings,
    stopped: threading.Event,
    *,
    consumers: int,
    selector: Selector,
) -> int:
    """Consume a topic like `consume`, but with several actors. Return the number of stored rows.

    The driver alone reads the first batch of a new table, because this batch sets the types of the join keys.

    Args:
        stream: The stream to the feature table.
        reading: Settings of the consumer.
        stopped: The caller sets it to stop the consumers.
        consumers: Maximum number of actors.
        selector: Labels of the nodes where they may run.

    Raises:
        SourceError: The brokers or the topic cannot be reached.
        Fenced: A consumer that started later took over.
    """
    total = consume(stream, reading, stopped, until_table=True)
    if not stream.key_types:
        return total  # stopped, or at the end of the topic, before the first row
    ends = end_offsets(reading)
    offsets = stream.offsets(list(ends))
    partition_groups = distribute_partitions(list(ends), min(consumers, reading.max_rows))
    max_rows = reading.max_rows // len(partition_groups)
    group = _ConsumerGroup(stream, dataclasses.replace(reading, max_rows=max_rows), selector)
    try:
        group.start(partition_groups)
        while not stopped.is_set() and has_remaining(offsets, ends if reading.once else None):
            parts = group.gather()
            if parts:
                messages = combine(parts)
                total += retry_on_conflict(lambda batch=messages: stream.store_checked(batch))  # type: ignore[misc]
                offsets |= {number: last + 1 for number, last in messages.last_offsets.items()}
    finally:
        group.end()
    return total


@dataclass(kw_only=True, slots=True)
class _Consumer:
    """An actor with exactly one pending read. Its previous result is committed before the next read starts."""

    partitions: Sequence[int]
    actor: Any
    pending: Any
    """Ray reference of the pending read."""
    deaths: int = 0


@dataclass(slots=True)
class _ConsumerGroup:
    """The actors of one driver. They end when the driver ends."""

    stream: KafkaStream
    reading: ConsumerSettings
    selector: Selector
    consumers: list[_Consumer] = field(default_factory=list)

    def start(self, partition_groups: Sequence[Sequence[int]]) -> None:
        """Start one actor for each group of partitions."""
        for partitions in partition_groups:
            actor = self._start_actor(partitions)
            self.consumers.append(_Consumer(partitions=partitions, actor=actor, pending=actor.read.remote()))

    def gather(self) -> list[CheckedMessages]:
        """Return the results that are ready. The caller must commit all these results before the next call."""
        pending = [consumer.pending for consumer in self.consumers]
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=self.reading.linger_s)
        results = [self._result(consumer) for consumer in self.consumers if consumer.pending in ready]
        return [messages for messages in results if messages is not None]

    def end(self) -> None:
        """Kill the actors."""
        for consumer in self.consumers:
            ray.kill(consumer.actor)

    def _result(self, consumer: _Consumer) -> CheckedMessages | None:
        """Return a ready result and start the next read. If the actor died, replace it and return None."""
        try:
            messages: CheckedMessages | None = ray.get(consumer.pending)
            consumer.deaths = 0
        except RayTaskError as error:
            raise refusal_behind(error) from error
        except RayError:
            consumer.deaths += 1
            if consumer.deaths > MAX_DEATHS:
                raise
            # The old actor must not be used again: messages that it read but did not return would be lost.
            ray.kill(consumer.actor)
            consumer.actor, messages = self._start_actor(consumer.partitions), None
            print(
                f"the consumer of partitions {list(consumer.partitions)} died; a new one continues",
                flush=True,
            )
        consumer.pending = consumer.actor.read.remote()
        return messages

    def _start_actor(self, partitions: Sequence[int]) -> Any:
        """Start a reader at the committed offsets. It reserves no CPU, so that other jobs do not wait for it."""
        actor_class = ray.remote(PartitionReader).options(
            num_cpus=0, scheduling_strategy="SPREAD", **options(self.selector)
        )
        return actor_class.remote(
            self.reading, self.stream.view.view, self.stream.offsets(partitions), self.stream.key_types
        )
