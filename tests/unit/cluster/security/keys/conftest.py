"""Fixtures of the tests of keys: a broker's world, a keyring, and a double of Vault."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.security.keys.keyring import RING_NAME, Keyring
from tests.servers.key_broker_world import INFO, NAME, OPEN, World
from tests.servers.vault_double import VaultDouble


@pytest.fixture
def world() -> Iterator[World]:
    """Yield a keyring with two keys, in a folder with a short path. The broker is not started."""
    with tempfile.TemporaryDirectory(prefix="fk-") as folder:
        ring = Keyring.create(Path(folder) / "keyring.json", secrets.token_bytes(32))
        ring.ensure(INFO)
        ring.ensure(OPEN)
        yield World(Path(folder) / "k.sock", ring)


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    """A keyring with one key of two versions."""
    ring = Keyring.create(tmp_path / RING_NAME, bytes(range(32)))
    ring.ensure(INFO)
    ring.rotate(NAME)
    return ring


@pytest.fixture
def double() -> Iterator[VaultDouble]:
    """A Vault double with an AppRole."""
    with VaultDouble() as double:
        double.state.approles["falaj"] = "canary-secret-id"
        yield double
