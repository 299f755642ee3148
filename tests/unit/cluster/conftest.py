"""Fixtures of all tests of `cluster`."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.security.keys import broker
from cluster.security.keys.keyring import Keyring
from tests.servers.key_broker_world import INFO, OPEN, World


@pytest.fixture(autouse=True)
def quick_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers check for a stop more often. Otherwise each of a hundred tests would wait a fifth of a second."""
    monkeypatch.setattr(broker, "_POLL_S", 0.02)


@pytest.fixture
def world() -> Iterator[World]:
    """Yield a keyring with two keys, in a folder with a short path. The broker is not started."""
    with tempfile.TemporaryDirectory(prefix="fk-") as folder:
        ring = Keyring.create(Path(folder) / "keyring.json", secrets.token_bytes(32))
        ring.ensure(INFO)
        ring.ensure(OPEN)
        yield World(Path(folder) / "k.sock", ring)
