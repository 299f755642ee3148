"""Fixture: one PostgreSQL server for all tests of a process. Each test makes a database of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Address of a PostgreSQL server that no test stops."""
    from tests.servers.postgresql import running_server  # imports SQLAlchemy, which many tests do not need

    with running_server() as address:
        yield address
