"""The embedded key store: versioned keys in one file, each encrypted under a key-encryption key.

The keyring is for one machine and for trials; production uses Vault. A process that can read both the file and the
key-encryption key has every key. So only the broker's process may read them.

A key is decrypted for each use and not cached. Python cannot erase decrypted keys from memory, see `kek`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import InvalidTag

from cluster.errors import ConfigError
from cluster.host.fsync import sync_folder
from cluster.security.keys.kek import KEK_BYTES, Derivation, create_kek_file, kek_from_file
from cluster.security.keys.ringfile import (
    Entry,
    Ring,
    decode,
    derivation_of,
    encode,
    exclusive,
    read,
    replace,
    seal,
    unseal,
)
from cluster.security.keys.store import (
    KeyEncryptionKeyWrong,
    KeyFileRefused,
    KeyInfo,
    KeyringDamaged,
    Wrapped,
    check_name,
    check_secret,
    not_found,
    not_this_key,
    parse_wrapped,
    revoked,
    write_wrapped,
)
from cluster.settings import SecretsConfig, SecretsKind, Tier

SCHEME = "kr"
ALTCHARS = b"-_"
RING_NAME = "keyring.json"
KEK_NAME = "kek"
NEW_KEK_NAME = "kek.new"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class _OpenRing:
    """A keyring's file as it was read, with its key-encryption key."""

    path: Path
    kek: bytes
    raw: bytes
    ring: Ring

    def version(self, entry: Entry, version: int) -> bytes:
        """Return one version of a key, decrypted."""
        try:
            return unseal(self.kek, entry.versions[version], _version_aad(entry.info, version))
        except InvalidTag:
            raise KeyringDamaged(
                f"Version {version} of key '{entry.info.name}' in {self.path} does not authenticate. "
                "Restore the keyring from a backup."
            ) from None

    def versions(self, entry: Entry) -> dict[int, bytes]:
        """Return every version of a key, decrypted."""
        return {version: self.version(entry, version) for version in entry.versions}


class Keyring:
    """A KeyStore in a file that `Keyring.create` made. Several threads and processes can use the file.

    Args:
        path: the file.
        kek: the file's key-encryption key.
        newer: called if another process has rotated the key-encryption key. It returns keys to try, so that a broker
            can keep running during a rotation.

    Raises:
        KeyringDamaged: the file is missing, truncated or altered.
        KeyEncryptionKeyWrong: `kek` is not the file's key.
    """

    def __init__(self, path: Path, kek: bytes, *, newer: Callable[[], Iterable[bytes]] = tuple) -> None:
        _check_kek(kek)
        self._path = path
        self._newer_keks = newer
        self._lock = threading.Lock()
        raw = read(path)
        self._cached = _OpenRing(path=path, kek=kek, raw=raw, ring=decode(raw, kek, path))

    def __repr__(self) -> str:
        return f"Keyring({str(self._path)!r})"

    @classmethod
    def create(cls, path: Path, kek: bytes, *, derivation: Derivation | None = None) -> Keyring:
        """Create an empty keyring.

        Raises:
            ConfigError: the file already exists.
        """
        _check_kek(kek)
        with exclusive(path):
            if path.exists():
                raise ConfigError(f"A keyring already exists at {path}, and it is never overwritten.")
            replace(path, encode(Ring(keys={}, derivation=derivation), kek))
        return cls(path, kek)

    def ensure(self, info: KeyInfo) -> None:
        """Create a key, or update its description."""
        entry = self._load().ring.keys.get(info.name)
        if entry is not None and entry.info == info and not entry.revoked:
            return
        with self._writing() as (opened, keys):
            old = keys.get(info.name)
            if old is None:
                first_version = {1: secrets.token_bytes(KEK_BYTES)}
                keys[info.name] = _seal_versions(opened.kek, info, newest=1, plain=first_version)
            elif old.revoked:
                raise revoked(info.name)
            elif old.info != info:
                keys[info.name] = _seal_versions(
                    opened.kek, info, newest=old.newest, plain=opened.versions(old)
                )

    def info(self, name: str) -> KeyInfo:
        """Return the description of a key."""
        return _require_live(self._load().ring.keys, name).info

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt a secret with the newest version of the key."""
        opened = self._load()
        entry = _require_live(opened.ring.keys, name)
        check_secret(name, secret)
        sealed = seal(opened.version(entry, entry.newest), secret, _secret_aad(name, entry.newest))
        return write_wrapped(Wrapped(version=entry.newest, sealed=sealed), scheme=SCHEME, altchars=ALTCHARS)

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt a wrapped secret."""
        opened = self._load()
        entry = _require_live(opened.ring.keys, name)
        parts = parse_wrapped(name, wrapped, scheme=SCHEME, altchars=ALTCHARS)
        if parts.version not in entry.versions:
            raise not_this_key(name)
        key = opened.version(entry, parts.version)
        try:
            return unseal(key, parts.sealed, _secret_aad(name, parts.version))
        except InvalidTag:
            raise not_this_key(name) from None

    def rewrap(self, name: str, wrapped: str) -> str:
        """Wrap a secret again, with the newest version of the key."""
        return self.wrap(name, self.unwrap(name, wrapped))

    def rotate(self, name: str) -> int:
        """Add a version and return its number."""
        with self._writing() as (opened, keys):
            entry = _require_live(keys, name)
            version = entry.newest + 1
            plain = {**opened.versions(entry), version: secrets.token_bytes(KEK_BYTES)}
            keys[name] = _seal_versions(opened.kek, entry.info, newest=version, plain=plain)
        return version

    def revoke(self, name: str) -> None:
        """Destroy every version and keep a tombstone.

        The file's old blocks stay on disk, encrypted under the key-encryption key, until they are overwritten. If an
        attacker could get both, rotate the key-encryption key afterwards and destroy the old key-encryption key.
        """
        with self._writing() as (_, keys):
            keys[name] = dataclasses.replace(_require_live(keys, name), versions={})

    def names(self) -> list[str]:
        """Return the names of the keys, sorted, without revoked keys."""
        return sorted(name for name, entry in self._load().ring.keys.items() if not entry.revoked)

    def rotate_kek(self, old: bytes, new: bytes, *, derivation: Derivation | None = None) -> None:
        """Encrypt every version under another key-encryption key, all or none.

        Afterwards, a process with the old key gets KeyEncryptionKeyWrong, unless its `newer` finds the new key.

        Raises:
            KeyEncryptionKeyWrong: `old` is not the keyring's key.
            ConfigError: `new` has the wrong size.
        """
        _check_kek(new)
        with exclusive(self._path):
            opened = self._load()
            if not hmac.compare_digest(old, opened.kek):
                raise KeyEncryptionKeyWrong(
                    f"The given old key-encryption key is not the key of {self._path}. Use its present key."
                )
            keys = {
                name: _seal_versions(new, entry.info, newest=entry.newest, plain=opened.versions(entry))
                for name, entry in opened.ring.keys.items()
            }
            ring = Ring(keys=keys, derivation=derivation)
            raw = encode(ring, new)
            with self._lock:  # no thread may read the new file with the old key
                replace(self._path, raw)
                self._cached = _OpenRing(path=self._path, kek=new, raw=raw, ring=ring)

    def _load(self) -> _OpenRing:
        """Return the file's current content. Another process may have changed the file since the last call."""
        with self._lock:
            raw = read(self._path)
            while raw != self._cached.raw:
                try:
                    self._cached = self._decode(raw)
                except KeyEncryptionKeyWrong:
                    # The file and its key were replaced again after this read.
                    previous, raw = raw, read(self._path)
                    if raw == previous:
                        raise
            return self._cached

    def _decode(self, raw: bytes) -> _OpenRing:
        try:
            ring = decode(raw, self._cached.kek, self._path)
            return dataclasses.replace(self._cached, raw=raw, ring=ring)
        except KeyEncryptionKeyWrong as wrong:
            for kek in self._newer_keks():
                try:
                    return _OpenRing(path=self._path, kek=kek, raw=raw, ring=decode(raw, kek, self._path))
                except KeyEncryptionKeyWrong:
                    continue
            raise wrong

    @contextmanager
    def _writing(self) -> Iterator[tuple[_OpenRing, dict[str, Entry]]]:
        """Take the lock, and yield the opened ring and a copy of its keys that the caller may change.

        If the caller's block succeeds and has changed the copy, the copy is written to the file.
        """
        with exclusive(self._path):
            opened = self._load()
            keys = dict(opened.ring.keys)
            yield opened, keys
            if keys != opened.ring.keys:
                replace(self._path, encode(dataclasses.replace(opened.ring, keys=keys), opened.kek))


def check_keyring(secrets_config: SecretsConfig, *, tier: Tier) -> None:
    """Refuse a keyring in a tier that needs Vault.

    Raises:
        ConfigError: the tier stores its keys in Vault, and `secrets.acknowledge_keyring` is not true.
    """
    if (
        tier is Tier.enterprise_gpu
        and secrets_config.kind is SecretsKind.keyring
        and not secrets_config.acknowledge_keyring
    ):
        raise ConfigError(
            f"Tier {tier.value} does not keep its keys in a keyring: a process that reads two files of one machine "
            "has all keys. Set secrets=vault, or secrets.acknowledge_keyring=true to accept that."
        )


def open_local(folder: Path) -> Keyring:
    """Open the keyring in `folder` with the key-encryption key in the same folder. Create both files at first use.

    Raises:
        KeyringDamaged: only one of the two files exists, or the keyring is damaged.
        KeyFileRefused: the key-encryption key's file cannot be used.
        KeyEncryptionKeyWrong: the two files do not belong together.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ring, kek = folder / RING_NAME, folder / KEK_NAME
    with exclusive(kek):
        for leftover in folder.glob(f".{KEK_NAME}*.tmp"):
            leftover.unlink()  # a killed process did not remove this second link to a key
        new_kek = folder / NEW_KEK_NAME
        if not ring.exists() and not kek.exists():
            # The key gets its final name only after the keyring exists, so an interrupted first start can be repeated.
            Keyring.create(ring, kek_from_file(new_kek) if new_kek.exists() else create_kek_file(new_kek))
            return _finish_kek_rotation(folder)
        if new_kek.exists() and not kek.exists():
            return _finish_kek_rotation(folder)
        if not ring.exists():
            raise KeyringDamaged(
                f"No keyring at {ring}, though its key-encryption key is at {kek}. Restore it from a backup; "
                f"if nothing was ever encrypted with it, remove {kek}."
            )
        try:
            return Keyring(ring, kek_from_file(kek), newer=lambda: _keks_in(folder))
        except KeyEncryptionKeyWrong:
            if not new_kek.exists():
                raise
            return _finish_kek_rotation(folder)


def rotate_local_kek(folder: Path) -> Keyring:
    """Encrypt the keyring in `folder` with a new key-encryption key. `open_local` completes an interrupted rotation.

    Raises:
        See `open_local`.
    """
    ring = open_local(folder)
    with exclusive(folder / KEK_NAME):
        new_kek = folder / NEW_KEK_NAME
        new_kek.unlink(missing_ok=True)  # an earlier rotation was interrupted before it changed the keyring
        ring.rotate_kek(kek_from_file(folder / KEK_NAME), create_kek_file(new_kek))
        return _finish_kek_rotation(folder)


def open_with_passphrase(path: Path, passphrase: str) -> Keyring:
    """Open the keyring at `path` with a passphrase. Create the keyring at first use.

    Raises:
        ConfigError: the passphrase is too short, or the keyring's key comes from a file.
        KeyEncryptionKeyWrong: the passphrase is wrong.
        KeyringDamaged: the keyring is damaged.
    """
    if not path.exists():
        derivation = Derivation.new()
        return Keyring.create(path, derivation.key(passphrase), derivation=derivation)
    stored = derivation_of(path)
    if stored is None:
        raise ConfigError(
            f"The key of keyring {path} comes from a file, not from a passphrase. Remove secrets.passphrase_file."
        )
    return Keyring(path, stored.key(passphrase))


def _finish_kek_rotation(folder: Path) -> Keyring:
    """Replace the old key-encryption key's file with the new key's file. The keyring is already under the new key."""
    ring, kek = folder / RING_NAME, kek_from_file(folder / NEW_KEK_NAME)
    keyring = Keyring(ring, kek, newer=lambda: _keks_in(folder))
    os.replace(folder / NEW_KEK_NAME, folder / KEK_NAME)
    sync_folder(folder)
    return keyring


def _keks_in(folder: Path) -> Iterator[bytes]:
    """Yield the key-encryption keys in the folder.

    A rotation first changes the keyring, then renames the new key's file to the old name. If neither key fits, the file
    was renamed between the two reads. So the first name is read again.
    """
    for name in (KEK_NAME, NEW_KEK_NAME, KEK_NAME):
        with contextlib.suppress(KeyFileRefused):
            yield kek_from_file(folder / name)


def _check_kek(kek: bytes) -> None:
    if len(kek) != KEK_BYTES:
        raise ConfigError(f"A key-encryption key has {KEK_BYTES} bytes, got {len(kek)}.")


def _require_live(keys: Mapping[str, Entry], name: str) -> Entry:
    entry = keys.get(check_name(name))
    if entry is None:
        raise not_found(name)
    if entry.revoked:
        raise revoked(name, entry.info)
    return entry


def _seal_versions(kek: bytes, info: KeyInfo, *, newest: int, plain: Mapping[int, bytes]) -> Entry:
    versions = {version: seal(kek, key, _version_aad(info, version)) for version, key in plain.items()}
    return Entry(info=info, newest=newest, versions=versions)


def _version_aad(info: KeyInfo, version: int) -> bytes:
    return b"falaj keyring: key\0" + str(version).encode() + b"\0" + info.canonical()


def _secret_aad(name: str, version: int) -> bytes:
    return b"falaj keyring: secret\0" + name.encode() + b"\0" + str(version).encode()
