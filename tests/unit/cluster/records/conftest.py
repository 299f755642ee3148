"""Fixtures of the tests of logs: the folders of a model's two logs, and a keyring with their keys."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.security.keys.keyring import Keyring
from tests.samples.record_log import new_keyring
from tests.servers.object_store import object_store_environment
from tests.servers.postgresql import new_database
from tests.servers.shared_logs import SharedLogs


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return new_keyring(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "predictions" / "m"


@pytest.fixture
def outcomes(tmp_path: Path) -> Path:
    return tmp_path / "outcomes" / "m"


@pytest.fixture(scope="module")
def servers(server: str) -> Iterator[tuple[str, str]]:
    """Bucket of the object store, and address of the database server."""
    with object_store_environment() as bucket:
        yield bucket, server


@pytest.fixture
def logs(servers: tuple[str, str], tmp_path: Path, keyring: Keyring) -> SharedLogs:
    """Nodes with one storage root and one ledger."""
    bucket, address = servers
    return SharedLogs(
        folder=tmp_path,
        bucket=bucket,
        address=new_database(address, f"d{uuid.uuid4().hex}"),
        keyring=keyring,
    )
