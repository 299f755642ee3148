"""librdkafka's mock broker: Kafka's real protocol on a loopback port, also for other processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import orjson
from confluent_kafka import Producer


class MockBroker:
    """A broker, and a producer for it."""

    def __init__(self) -> None:
        self._producer = Producer({"test.mock.num.brokers": 1, "linger.ms": 0})
        [broker] = self._producer.list_topics(timeout=10).brokers.values()
        self.servers = f"{broker.host}:{broker.port}"

    def send(self, topic: str, *rows: Any, partition: int = 0) -> None:
        """Send rows: bytes unchanged, other rows as JSON. When this returns, the broker has all rows."""
        for row in rows:
            value = row if isinstance(row, bytes) or row is None else orjson.dumps(row)
            self._producer.produce(topic, value, partition=partition)
        assert self._producer.flush(10) == 0

    def close(self) -> None:
        """Stop the broker together with its producer."""
        del self._producer


@contextlib.contextmanager
def mock_broker() -> Iterator[MockBroker]:
    """Yield a new, empty broker."""
    broker = MockBroker()
    yield broker
    broker.close()
