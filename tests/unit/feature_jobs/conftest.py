"""A key broker for all tests of the feature store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.security.keys.access import KeyAccess
from tests.broker import running_broker
from tests.redis_server import running_redis


@pytest.fixture(scope="package")
def access() -> Iterator[KeyAccess]:
    """With the keys of the views that the tests write."""
    views = ("income", "person", "cohort", "sparse", "household", "empty")
    keys = [f"features/{view}/internal" for view in views]
    pushed = ("push/income/sensitive", "quarantine/income/sensitive", "online/income/internal")
    with running_broker(*keys, *pushed, "features/income/personal", "online/income/personal") as access:
        yield access


@pytest.fixture(scope="package")
def redis_url() -> Iterator[str]:
    """A Redis of the tests' own."""
    with running_redis() as url:
        yield url
