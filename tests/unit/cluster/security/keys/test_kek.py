"""The key-encryption key of a keyring: from a passphrase or a private file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.security.keys.kek import Derivation, create_kek_file, kek_from_file, kek_from_passphrase
from cluster.security.keys.keyring import RING_NAME, Keyring, open_with_passphrase
from cluster.security.keys.ringfile import derivation_of
from cluster.security.keys.store import KeyEncryptionKeyWrong, KeyFileRefused
from tests.servers.key_broker_world import INFO, NAME


def test_only_its_passphrase_opens_a_keyring(tmp_path: Path) -> None:
    """Salt and cost are in the header. Unicode normal forms of one passphrase are equal."""
    path = tmp_path / RING_NAME
    open_with_passphrase(path, "correct horse bättery").ensure(INFO)
    assert open_with_passphrase(path, "correct horse ba\u0308ttery").info(NAME) == INFO
    with pytest.raises(KeyEncryptionKeyWrong):
        open_with_passphrase(path, "correct horse battery")
    stored = derivation_of(path)
    assert stored is not None
    assert (stored.n, stored.r, stored.p, len(stored.salt)) == (2**17, 8, 1, 16)


def test_weak_passphrases_and_parameters_are_refused(ring: Keyring, tmp_path: Path) -> None:
    """A keyring with a key file also refuses a passphrase."""
    with pytest.raises(ConfigError, match="at least 12 characters"):
        kek_from_passphrase("short", bytes(16))
    for parameters in ({"salt": b"x"}, {"n": 2**10}, {"n": 2**21}, {"n": 2**17 + 1}, {"r": 0}, {"p": 100}):
        with pytest.raises(ConfigError, match="scrypt"):
            Derivation(**{"salt": bytes(16), **parameters})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="comes from a file"):
        open_with_passphrase(tmp_path / RING_NAME, "correct horse battery")


def test_kek_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    """The file has mode 0600 and 32 random bytes, and no temporary file is left."""
    made = create_kek_file(tmp_path / "kek")
    assert kek_from_file(tmp_path / "kek") == made != bytes(32)
    assert len(made) == 32
    assert (tmp_path / "kek").stat().st_mode & 0o7777 == 0o600
    with pytest.raises(KeyFileRefused, match="never overwritten"):
        create_kek_file(tmp_path / "kek")
    assert [path.name for path in tmp_path.iterdir()] == ["kek"]
    assert kek_from_file(tmp_path / "kek") == made


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o400, 0o700, 0o604])
def test_kek_file_with_another_mode_is_refused(tmp_path: Path, mode: int) -> None:
    """The message names the mode and the remedy."""
    create_kek_file(tmp_path / "kek")
    (tmp_path / "kek").chmod(mode)
    with pytest.raises(KeyFileRefused, match=f"mode {mode:04o}, not 0600"):
        kek_from_file(tmp_path / "kek")


def test_invalid_kek_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a link, a folder, a pipe, a wrong size, and a file of another user."""
    create_kek_file(tmp_path / "kek")
    (tmp_path / "link").symlink_to(tmp_path / "kek")
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, size in (("short", 31), ("long", 33), ("empty", 0)):
        (tmp_path / name).write_bytes(bytes(size))
        (tmp_path / name).chmod(0o600)
    for name in ("missing", "link", "folder", "pipe", "short", "long", "empty"):
        with pytest.raises(KeyFileRefused, match=name):
            kek_from_file(tmp_path / name)
    if os.geteuid() == 0:
        os.chown(tmp_path / "kek", 65534, 65534)
        with pytest.raises(KeyFileRefused, match="belongs to user 65534"):
            kek_from_file(tmp_path / "kek")
