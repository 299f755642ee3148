"""Fixtures for tests of topics."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.kafka_broker import MockBroker, mock_broker


@pytest.fixture
def broker() -> Iterator[MockBroker]:
    """A broker without messages."""
    with mock_broker() as broker:
        yield broker
