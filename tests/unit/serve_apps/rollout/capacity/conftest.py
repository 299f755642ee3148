"""A ledger database in SQLite and in PostgreSQL."""

from __future__ import annotations

from tests.unit.cluster.ledger.conftest import url

__all__ = ["url"]
