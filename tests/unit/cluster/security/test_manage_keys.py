"""The command for keys: rotation of the key-encryption key under a running broker, and revocation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AccessDenied, ConfigError
from cluster.ledger import Ledger
from cluster.ledger.events import KeyEncryptionKeyRotated, KeyRevocation
from cluster.security.acting import Actor, create_actor
from cluster.security.keys import keyring, ringfile
from cluster.security.keys.kek import kek_from_file
from cluster.security.keys.keyring import KEK_NAME, open_local, rotate_local_kek
from cluster.security.keys.store import KeyRevoked
from cluster.security.manage_keys import ENTRYPOINT, KeyAction, ManageKeysConfig, revoke, rotate_kek
from cluster.security.tokens.issuer import ensure_issuer
from cluster.settings import IdentityConfig, SecretsConfig, StorageConfig
from cluster.storage import Layout
from tests.servers.key_broker_world import INFO
from tests.servers.replica import record


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ensure_issuer(Layout(str(tmp_path)))
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def config(tmp_path: Path, *, role: str = "admin", **settings: Any) -> ManageKeysConfig:
    return ManageKeysConfig(
        storage=StorageConfig(root=str(tmp_path)), identity=IdentityConfig(role=role), **settings
    )


def actor(tmp_path: Path, ledger: Ledger, *, role: str = "admin") -> Actor:
    return create_actor(config(tmp_path, role=role), record(tmp_path, "", 1), ledger, entrypoint=ENTRYPOINT)


def test_running_broker_follows_a_kek_rotation(tmp_path: Path, ledger: Ledger) -> None:
    """The broker reads the new key from the same path, and old secrets unwrap."""
    broker = open_local(tmp_path / "keys")
    broker.ensure(INFO)
    text, old = broker.wrap(INFO.name, b"secret"), kek_from_file(tmp_path / "keys" / KEK_NAME)
    for _ in range(2):
        assert rotate_kek(config(tmp_path), ledger, actor(tmp_path, ledger)) == 1
        assert broker.unwrap(INFO.name, text) == b"secret"
        broker.rotate(INFO.name)
    assert kek_from_file(tmp_path / "keys" / KEK_NAME) != old
    assert open_local(tmp_path / "keys").unwrap(INFO.name, text) == b"secret"
    assert len(list(ledger.entries(KeyEncryptionKeyRotated))) == 2


def test_running_broker_reads_during_kek_rotations(tmp_path: Path) -> None:
    """It also reads after the keyring's file was changed and before the file of its key is renamed."""
    broker = open_local(tmp_path)
    broker.ensure(INFO)
    text = broker.wrap(INFO.name, b"secret")
    program = (
        "import sys; from pathlib import Path; from cluster.security.keys.keyring import rotate_local_kek\n"
        "for _ in range(15): rotate_local_kek(Path(sys.argv[1]))"
    )
    rotating = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    while rotating.poll() is None:
        assert broker.unwrap(INFO.name, text) == b"secret"
    assert rotating.returncode == 0


def test_reader_slower_than_two_rotations_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy of the file has a key that no longer exists, so it reads the file again."""
    broker = open_local(tmp_path)
    broker.ensure(INFO)
    text = broker.wrap(INFO.name, b"secret")
    rotate_local_kek(tmp_path)
    between = keyring.read(broker._path)
    rotate_local_kek(tmp_path)
    late = iter([between])
    monkeypatch.setattr(keyring, "read", lambda path: next(late, None) or ringfile.read(path))
    assert broker.unwrap(INFO.name, text) == b"secret"


def test_only_a_key_manager_revokes_a_key(tmp_path: Path, ledger: Ledger) -> None:
    """The event is written before the key is destroyed."""
    ring = open_local(tmp_path / "keys")
    ring.ensure(INFO)
    with pytest.raises(AccessDenied):
        revoke(INFO.name, ring, ledger, actor(tmp_path, ledger, role="data_engineer"))
    assert list(ledger.entries(KeyRevocation)) == []
    revoke(INFO.name, ring, ledger, actor(tmp_path, ledger))
    assert [entry.payload["described"]["column_class"] for entry in ledger.entries(KeyRevocation)] == [
        "personal"
    ]
    with pytest.raises(KeyRevoked):
        ring.info(INFO.name)
    with pytest.raises(KeyRevoked):
        revoke(INFO.name, ring, ledger, actor(tmp_path, ledger))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({}, "name of a key"), ({"key": "k"}, "confirm=k"), ({"key": "k", "confirm": "other"}, "confirm=k")],
)
def test_revocation_needs_a_confirmation(tmp_path: Path, settings: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        config(tmp_path, action=KeyAction.revoke, **settings)


def test_rotation_is_refused_for_a_passphrase_and_without_the_right(tmp_path: Path, ledger: Ledger) -> None:
    """A keyring under a passphrase has no key file."""
    under_passphrase = config(tmp_path, secrets=SecretsConfig(passphrase_file="p"))
    with pytest.raises(ConfigError, match="passphrase"):
        rotate_kek(under_passphrase, ledger, actor(tmp_path, ledger))
    with pytest.raises(AccessDenied):
        rotate_kek(config(tmp_path), ledger, actor(tmp_path, ledger, role="auditor"))
