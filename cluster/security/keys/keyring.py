"""The embedded key store: versioned keys in one file, each encrypted under a key-encryption key.

For one machine and for trying things out: whoever can read both the file and the key-encryption key has every key, so
the two belong to the broker's process alone. Production uses Vault.

Keys are decrypted when they are used and not kept; that Python cannot wipe them afterwards is said in `kek`.
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
from cluster.synced import sync_folder

SCHEME = "kr"
ALTCHARS = b"-_"
RING_NAME = "keyring.json"
KEK_NAME = "kek"
NEW_KEK_NAME = "kek.new"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class _Opened:
    """A keyring's file as it was read, with the key-encryption key it is under."""

    path: Path
    kek: bytes
    raw: bytes
    ring: Ring

    def version(self, entry: Entry, version: int) -> bytes:
        """One version of a key, decrypted."""
        try:
            return unseal(self.kek, entry.versions[version], _version_bound(entry.info, version))
        except InvalidTag:
            raise KeyringDamaged(
                f"Version {version} of key '{entry.info.name}' in {self.path} does not authenticate. "
                "Restore the keyring from a backup."
            ) from None

    def versions(self, entry: Entry) -> dict[int, bytes]:
        """Every version of a key, decrypted."""
        return {version: self.version(entry, version) for version in entry.versions}


class Keyring:
    """A KeyStore over a file that `Keyring.create` made; safe for several threads and processes.

    Args:
        path: the file.
        kek: its key-encryption key.
        newer: gives the keys that may have taken that one's place, when the file turns out to be under another: so a
            broker goes on while somebody else gives the keyring a new one.

    Raises:
        KeyringDamaged: the file is missing, truncated or altered.
        KeyEncryptionKeyWrong: `kek` is not the file's.
    """

    def __init__(self, path: Path, kek: bytes, *, newer: Callable[[], Iterable[bytes]] = tuple) -> None:
        _check_kek(kek)
        self._path = path
        self._newer = newer
        self._lock = threading.Lock()
        raw = read(path)
        self._last = _Opened(path=path, kek=kek, raw=raw, ring=decode(raw, kek, path))

    def __repr__(self) -> str:
        return f"Keyring({str(self._path)!r})"

    @classmethod
    def create(cls, path: Path, kek: bytes, *, derivation: Derivation | None = None) -> Keyring:
        """Make an empty keyring.

        Raises:
            ConfigError: there is a file already.
        """
        _check_kek(kek)
        with exclusive(path):
            if path.exists():
                raise ConfigError(f"There is a keyring at {path} already; it is never overwritten.")
            replace(path, encode(Ring(keys={}, derivation=derivation), kek))
        return cls(path, kek)

    def ensure(self, info: KeyInfo) -> None:
        """Create a key, or update its description."""
        known = self._opened().ring.keys.get(info.name)
        if known is not None and known.info == info and not known.revoked:
            return
        with self._writing() as (opened, keys):
            old = keys.get(info.name)
            if old is None:
                fresh = {1: secrets.token_bytes(KEK_BYTES)}
                keys[info.name] = _sealed(opened.kek, info, newest=1, plain=fresh)
            elif old.revoked:
                raise revoked(info.name)
            elif old.info != info:
                keys[info.name] = _sealed(opened.kek, info, newest=old.newest, plain=opened.versions(old))

    def info(self, name: str) -> KeyInfo:
        """The description of a key."""
        return _living(self._opened().ring.keys, name).info

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt a secret under the newest version."""
        opened = self._opened()
        entry = _living(opened.ring.keys, name)
        check_secret(name, secret)
        sealed = seal(opened.version(entry, entry.newest), secret, _secret_bound(name, entry.newest))
        return write_wrapped(Wrapped(version=entry.newest, sealed=sealed), scheme=SCHEME, altchars=ALTCHARS)

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt a wrapped secret."""
        opened = self._opened()
        entry = _living(opened.ring.keys, name)
        parts = parse_wrapped(name, wrapped, scheme=SCHEME, altchars=ALTCHARS)
        if parts.version not in entry.versions:
            raise not_this_key(name)
        key = opened.version(entry, parts.version)
        try:
            return unseal(key, parts.sealed, _secret_bound(name, parts.version))
        except InvalidTag:
            raise not_this_key(name) from None

    def rewrap(self, name: str, wrapped: str) -> str:
        """Wrap a secret anew under the newest version."""
        return self.wrap(name, self.unwrap(name, wrapped))

    def rotate(self, name: str) -> int:
        """Add a version; gives its number."""
        with self._writing() as (opened, keys):
            entry = _living(keys, name)
            version = entry.newest + 1
            plain = {**opened.versions(entry), version: secrets.token_bytes(KEK_BYTES)}
            keys[name] = _sealed(opened.kek, entry.info, newest=version, plain=plain)
        return version

    def revoke(self, name: str) -> None:
        """Destroy every version and keep a tombstone.

        The file's former blocks stay on the disk until they are overwritten, still encrypted under the key-encryption
        key: to be sure against somebody who has both, rotate that afterwards and destroy the old one.
        """
        with self._writing() as (_, keys):
            keys[name] = dataclasses.replace(_living(keys, name), versions={})

    def names(self) -> list[str]:
        """The names of the living keys, sorted."""
        return sorted(name for name, entry in self._opened().ring.keys.items() if not entry.revoked)

    def rotate_kek(self, old: bytes, new: bytes, *, derivation: Derivation | None = None) -> None:
        """Encrypt every version under another key-encryption key, all or none.

        Other processes that hold the old one are refused from then on (KeyEncryptionKeyWrong), unless they know where
        to look for a newer one.

        Raises:
            KeyEncryptionKeyWrong: `old` is not the present one.
            ConfigError: `new` has the wrong size.
        """
        _check_kek(new)
        with exclusive(self._path):
            opened = self._opened()
            if not hmac.compare_digest(old, opened.kek):
                raise KeyEncryptionKeyWrong(f"The old key-encryption key given is not that of {self._path}.")
            keys = {
                name: _sealed(new, entry.info, newest=entry.newest, plain=opened.versions(entry))
                for name, entry in opened.ring.keys.items()
            }
            ring = Ring(keys=keys, derivation=derivation)
            raw = encode(ring, new)
            with self._lock:  # no reader between the new file and the new key
                replace(self._path, raw)
                self._last = _Opened(path=self._path, kek=new, raw=raw, ring=ring)

    def _opened(self) -> _Opened:
        """The file as it is now: another process may have changed it since."""
        with self._lock:
            raw = read(self._path)
            while raw != self._last.raw:
                try:
                    self._last = self._decoded(raw)
                except KeyEncryptionKeyWrong:
                    # A slow reader: the file and its key were replaced again after the file was read.
                    before, raw = raw, read(self._path)
                    if raw == before:
                        raise
            return self._last

    def _decoded(self, raw: bytes) -> _Opened:
        try:
            ring = decode(raw, self._last.kek, self._path)
            return dataclasses.replace(self._last, raw=raw, ring=ring)
        except KeyEncryptionKeyWrong as wrong:
            for kek in self._newer():
                try:
                    return _Opened(path=self._path, kek=kek, raw=raw, ring=decode(raw, kek, self._path))
                except KeyEncryptionKeyWrong:
                    continue
            raise wrong

    @contextmanager
    def _writing(self) -> Iterator[tuple[_Opened, dict[str, Entry]]]:
        """The keys, to be changed under the lock; written when the block ends well and something changed."""
        with exclusive(self._path):
            opened = self._opened()
            keys = dict(opened.ring.keys)
            yield opened, keys
            if keys != opened.ring.keys:
                replace(self._path, encode(dataclasses.replace(opened.ring, keys=keys), opened.kek))


def check_keyring(chosen: SecretsConfig, *, tier: Tier) -> None:
    """Refuse a keyring where production needs more.

    Raises:
        ConfigError: the tier keeps its keys in Vault, unless told that it does not.
    """
    if tier is Tier.enterprise_gpu and chosen.kind is SecretsKind.keyring and not chosen.acknowledge_keyring:
        raise ConfigError(
            f"Tier {tier.value} does not keep its keys in a keyring: whoever reads two files of one machine has them "
            "all. Set secrets=vault, or secrets.acknowledge_keyring=true if that is how it shall be."
        )


def open_local(folder: Path) -> Keyring:
    """The keyring below `folder` with its key-encryption key beside it; both are made on first use.

    Raises:
        KeyringDamaged: one of the two is there without the other, or the keyring is damaged.
        KeyFileRefused: the key-encryption key's file cannot be used as it lies there.
        KeyEncryptionKeyWrong: the two do not belong together.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ring, kek = folder / RING_NAME, folder / KEK_NAME
    with exclusive(kek):
        for torn in folder.glob(f".{KEK_NAME}*.tmp"):
            torn.unlink()  # a second name of a key, left when its maker was killed
        fresh = folder / NEW_KEK_NAME
        if not ring.exists() and not kek.exists():
            # Under its last name only once there is something under it: a start that is cut off is just begun again.
            Keyring.create(ring, kek_from_file(fresh) if fresh.exists() else create_kek_file(fresh))
            return _finish_kek_rotation(folder)
        if fresh.exists() and not kek.exists():
            return _finish_kek_rotation(folder)
        if not ring.exists():
            raise KeyringDamaged(
                f"No keyring at {ring}, though its key-encryption key is at {kek}. Restore it from a backup; "
                f"if nothing was ever encrypted with it, remove {kek}."
            )
        try:
            return Keyring(ring, kek_from_file(kek), newer=lambda: _keks_in(folder))
        except KeyEncryptionKeyWrong:
            if not fresh.exists():
                raise
            return _finish_kek_rotation(folder)


def rotate_local_kek(folder: Path) -> Keyring:
    """Give the keyring below `folder` a new key-encryption key; a crash midway is finished by `open_local`.

    Raises:
        as `open_local`.
    """
    ring = open_local(folder)
    with exclusive(folder / KEK_NAME):
        fresh = folder / NEW_KEK_NAME
        fresh.unlink(missing_ok=True)  # of a rotation that ended before it reached the keyring
        ring.rotate_kek(kek_from_file(folder / KEK_NAME), create_kek_file(fresh))
        return _finish_kek_rotation(folder)


def open_with_passphrase(path: Path, passphrase: str) -> Keyring:
    """The keyring at `path`, its key-encryption key derived as its header says; made on first use.

    Raises:
        ConfigError: the passphrase is too short, or the keyring's key comes from a file.
        KeyEncryptionKeyWrong: another passphrase.
        KeyringDamaged: the keyring is damaged.
    """
    if not path.exists():
        derivation = Derivation.new()
        return Keyring.create(path, derivation.key(passphrase), derivation=derivation)
    stored = derivation_of(path)
    if stored is None:
        raise ConfigError(
            f"The key of keyring {path} comes from a file, not from a passphrase. Leave secrets.passphrase_file out."
        )
    return Keyring(path, stored.key(passphrase))


def _finish_kek_rotation(folder: Path) -> Keyring:
    """The keyring is already under the new key: let its file take the old one's place."""
    ring, kek = folder / RING_NAME, kek_from_file(folder / NEW_KEK_NAME)
    keyring = Keyring(ring, kek, newer=lambda: _keks_in(folder))
    os.replace(folder / NEW_KEK_NAME, folder / KEK_NAME)
    sync_folder(folder)
    return keyring


def _keks_in(folder: Path) -> Iterator[bytes]:
    """The key-encryption keys that lie there now. A rotation puts the keyring under the new one first, and then gives
    that the old one's name, so one that is under neither has moved on in between: the first name is read again."""
    for name in (KEK_NAME, NEW_KEK_NAME, KEK_NAME):
        with contextlib.suppress(KeyFileRefused):
            yield kek_from_file(folder / name)


def _check_kek(kek: bytes) -> None:
    if len(kek) != KEK_BYTES:
        raise ConfigError(f"A key-encryption key has {KEK_BYTES} bytes, got {len(kek)}.")


def _living(keys: Mapping[str, Entry], name: str) -> Entry:
    entry = keys.get(check_name(name))
    if entry is None:
        raise not_found(name)
    if entry.revoked:
        raise revoked(name, entry.info)
    return entry


def _sealed(kek: bytes, info: KeyInfo, *, newest: int, plain: Mapping[int, bytes]) -> Entry:
    versions = {version: seal(kek, key, _version_bound(info, version)) for version, key in plain.items()}
    return Entry(info=info, newest=newest, versions=versions)


def _version_bound(info: KeyInfo, version: int) -> bytes:
    return b"falaj keyring: key\0" + str(version).encode() + b"\0" + info.canonical()


def _secret_bound(name: str, version: int) -> bytes:
    return b"falaj keyring: secret\0" + name.encode() + b"\0" + str(version).encode()
