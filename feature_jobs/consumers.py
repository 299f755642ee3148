"""A topic read and checked by several Ray actors, and committed by the driver.

Delta takes one commit after another anyway, so only what comes before is shared out, which pays where a transform is
costly: each actor reads, transforms and checks its partitions, and the driver gives the numbers and commits what they
all gave as one batch. Position, fencing and recovery are therefore those of one process, and an actor that died is
started again at the committed offsets.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.session import refusal_behind
from feature_jobs.store.streaming.checked_messages import CheckedMessages, together
from feature_jobs.store.streaming.kafka_consumer import (
    PartitionReader,
    Reading,
    bounds,
    consume,
    is_left,
    shares,
    until_committed,
)
from feature_jobs.store.streaming.kafka_stream import KafkaStream

MAX_DEATHS = 3
"""In a row, of one consumer that gave nothing in between."""


def consume_apart(stream: KafkaStream, reading: Reading, stopped: threading.Event, *, consumers: int) -> int:
    """As `consume`, with so many actors; the first batch, which says of which types keys are, is the driver's alone.

    Raises:
        SourceError: the brokers or the topic cannot be reached.
        Fenced: a consumer that started later took over.
    """
    total = consume(stream, reading, stopped, until_table=True)
    if not stream.key_types:
        return total  # stopped, or at the end, before the first row
    ends = bounds(reading)
    offsets = stream.offsets(list(ends))
    dealt = shares(list(ends), min(consumers, reading.max_rows))
    crew = _Crew(stream, dataclasses.replace(reading, max_rows=reading.max_rows // len(dealt)))
    try:
        crew.start(dealt)
        while not stopped.is_set() and is_left(offsets, ends if reading.once else None):
            parts = crew.gather()
            if parts:
                messages = together(parts)
                total += until_committed(lambda taken=messages: stream.store_checked(taken))  # type: ignore[misc]
                offsets |= {number: last + 1 for number, last in messages.reached.items()}
    finally:
        crew.end()
    return total


@dataclass(kw_only=True, slots=True)
class _Consumer:
    """An actor with one answer on its way, never more: what it gave before is committed when it is asked again."""

    partitions: Sequence[int]
    actor: Any
    answer: Any
    deaths: int = 0


@dataclass(slots=True)
class _Crew:
    """The actors of one driver; they end with it."""

    stream: KafkaStream
    reading: Reading
    consumers: list[_Consumer] = field(default_factory=list)

    def start(self, dealt: Sequence[Sequence[int]]) -> None:
        """An actor for each share of the partitions."""
        for partitions in dealt:
            actor = self._actor(partitions)
            self.consumers.append(_Consumer(partitions=partitions, actor=actor, answer=actor.read.remote()))

    def gather(self) -> list[CheckedMessages]:
        """What consumers have for the next commit; all that it returns must be committed before the next call."""
        answers = [one.answer for one in self.consumers]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=self.reading.linger_s)
        given = [self._answer(one) for one in self.consumers if one.answer in ready]
        return [messages for messages in given if messages is not None]

    def end(self) -> None:
        """End the actors."""
        for one in self.consumers:
            ray.kill(one.actor)

    def _answer(self, consumer: _Consumer) -> CheckedMessages | None:
        """One that came, with the next asked for; none from an actor that died, in whose place another is started."""
        try:
            messages: CheckedMessages | None = ray.get(consumer.answer)
            consumer.deaths = 0
        except RayTaskError as error:
            raise refusal_behind(error) from error
        except RayError:
            consumer.deaths += 1
            if consumer.deaths > MAX_DEATHS:
                raise
            # Whatever is left of it must not be asked again: what it read and could not give would be missing.
            ray.kill(consumer.actor)
            consumer.actor, messages = self._actor(consumer.partitions), None
            print(f"the consumer of partitions {list(consumer.partitions)} died; another goes on", flush=True)
        consumer.answer = consumer.actor.read.remote()
        return messages

    def _actor(self, partitions: Sequence[int]) -> Any:
        """A reader from the committed offsets on; it holds no core, so that other jobs need not wait for its end."""
        kind = ray.remote(PartitionReader).options(num_cpus=0, scheduling_strategy="SPREAD")
        return kind.remote(
            self.reading, self.stream.view.view, self.stream.offsets(partitions), self.stream.key_types
        )
