"""A ledger database in SQLite and in PostgreSQL."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.servers.postgresql import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    return new_database(request.getfixturevalue("server"), secrets.token_hex(4))
