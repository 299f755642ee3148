"""Fixtures: the counts of a rollout in each database, and an edge whose access files are counted."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from tests.samples.access_records import ROLLOUT_ID
from tests.samples.rollout_evidence import Node
from tests.servers.postgresql import new_database


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "sqlite":
        opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    else:
        opened = Ledger(new_database(request.getfixturevalue("server"), secrets.token_hex(4)))
    yield opened
    opened.close()


@pytest.fixture
def store(ledger: Ledger) -> EvidenceStore:
    opened = EvidenceStore(ledger.engine)
    opened.register(ROLLOUT_ID, Counting(slow_ms=100))
    return opened


@pytest.fixture
def node(ledger: Ledger, tmp_path: Path) -> Node:
    return Node(ledger, tmp_path / "access")
