"""Fixtures for all tests of the feature store: a key broker, a Redis server, a ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.security.keys.access import KeyAccess
from tests.servers.key_broker import running_broker
from tests.servers.redis_server import running_redis


@pytest.fixture(scope="package")
def access() -> Iterator[KeyAccess]:
    """Access to a key broker that has the keys of the tests' views."""
    views = ("income", "person", "cohort", "sparse", "household", "empty")
    keys = [f"features/{view}/internal" for view in views]
    pushed = ("push/income/sensitive", "quarantine/income/sensitive", "online/income/internal")
    with running_broker(*keys, *pushed, "features/income/personal", "online/income/personal") as access:
        yield access


@pytest.fixture(scope="package")
def redis_url() -> Iterator[str]:
    """URL of a Redis server for the tests."""
    with running_redis() as url:
        yield url


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger."""
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()
