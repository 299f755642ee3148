"""Reads and replaces the keyring's file. No change is lost after a crash or when two processes write.

The file is one line of canonical JSON: a body with the keys, the body's SHA-256, and the body's HMAC. The HMAC's key is
derived from the key-encryption key. The SHA-256 reveals damage before any key is used. The HMAC reveals a change by an
attacker without the key-encryption key. But an older copy of the file cannot be detected. So only the broker's user may
be able to write to the folder.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cluster.errors import RefusedError
from cluster.host.fsync import sync_folder
from cluster.security.keys.kek import Derivation
from cluster.security.keys.store import KeyEncryptionKeyWrong, KeyInfo, KeyringDamaged, canonical

FORMAT = "falaj-keyring"
VERSION = 1
NONCE_BYTES = 12
_CHECK = b"falaj keyring: check"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A key: its description and its encrypted versions. A revoked key has no versions."""

    info: KeyInfo
    newest: int
    versions: Mapping[int, bytes] = field(repr=False)

    @property
    def revoked(self) -> bool:
        """Whether this entry is the tombstone of a revoked key."""
        return not self.versions


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """Content of a keyring's file."""

    keys: Mapping[str, Entry]
    derivation: Derivation | None = None
    """How the key-encryption key is derived from a passphrase; None if it comes from a file."""


def seal(key: bytes, data: bytes, aad: bytes) -> bytes:
    """Encrypt data with AES-256-GCM. The result starts with a random 96-bit nonce.

    Random nonces are safe for 2^32 messages under one key.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, data, aad)


def unseal(key: bytes, sealed: bytes, aad: bytes) -> bytes:
    """Decrypt the result of `seal`.

    Raises:
        InvalidTag: the data was altered, or sealed with another key or AAD.
    """
    return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], aad)


def encode(ring: Ring, kek: bytes) -> bytes:
    """Return the file's bytes."""
    derivation = ring.derivation
    body = {
        "check": _text(seal(kek, b"", _CHECK)),
        "scrypt": derivation
        and {"salt": _text(derivation.salt), "n": derivation.n, "r": derivation.r, "p": derivation.p},
        "keys": {
            name: {
                "info": entry.info.plain(),
                "newest": entry.newest,
                "versions": {str(version): _text(sealed) for version, sealed in entry.versions.items()},
            }
            for name, entry in ring.keys.items()
        },
    }
    return _serialize(body, mac=_mac(kek, canonical(body)))


def decode(raw: bytes, kek: bytes, path: Path) -> Ring:
    """Return the content of a keyring's file.

    Raises:
        KeyringDamaged: the file is truncated, altered, or of another format.
        KeyEncryptionKeyWrong: the file is intact, but `kek` is not its key.
    """
    body, mac = _body(raw, path)
    try:
        check = _bytes(body["check"])
        unseal(kek, check, _CHECK)
    except InvalidTag:
        raise KeyEncryptionKeyWrong(
            f"The keyring {path} was made with another key-encryption key or passphrase. Use the original one."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not hmac.compare_digest(mac, _mac(kek, canonical(body))):
        raise _damaged(path, "it was changed without its key")
    try:
        return Ring(
            keys={str(name): _entry(name, value) for name, value in body["keys"].items()},
            derivation=_derivation(body),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, "its keys cannot be read") from error


def derivation_of(path: Path) -> Derivation | None:
    """Return how the keyring's key is derived from a passphrase, or None if the key comes from a file.

    Raises:
        KeyringDamaged: the keyring's file is missing, truncated or altered.
    """
    body, _ = _body(read(path), path)
    try:
        return _derivation(body)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its header cannot be read") from error


def read(path: Path) -> bytes:
    """Return the file's bytes.

    Raises:
        KeyringDamaged: the file is missing. No new, empty file is created in its place.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KeyringDamaged(
            f"No keyring at {path}. Restore it from a backup; `Keyring.create` makes a new, empty one."
        ) from None


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Lock the keyring, so that only one thread of all processes can write. A killed process releases its lock."""
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        # flock belongs to the open file: unlike lockf, it also locks out other threads of this process.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace(path: Path, raw: bytes) -> None:
    """Replace the content of the keyring, completely or not at all. The caller holds the lock."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()  # its writer was killed, because a running writer would hold the lock
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _serialize(body: dict[str, Any], *, mac: bytes) -> bytes:
    digest = hashlib.sha256(canonical(body)).digest()
    document = {
        "format": FORMAT,
        "version": VERSION,
        "body": body,
        "sha256": _text(digest),
        "mac": _text(mac),
    }
    return canonical(document) + b"\n"


def _body(raw: bytes, path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the body and its MAC, after checking the format and the SHA-256. This does not detect a forged body."""
    try:
        document = json.loads(raw)
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise _damaged(
                path, f"it is not of format {FORMAT} {VERSION}; was it written by another release?"
            )
        body, mac = document["body"], _bytes(document["mac"])
        if isinstance(body, dict) and _serialize(body, mac=mac) == raw:
            return body, mac
    except RefusedError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "it is truncated or altered") from error
    raise _damaged(path, "it is truncated or altered")


def _entry(name: str, value: dict[str, Any]) -> Entry:
    entry = Entry(
        info=KeyInfo.from_plain(value["info"]),
        newest=int(value["newest"]),
        versions={int(version): _bytes(sealed) for version, sealed in value["versions"].items()},
    )
    if entry.info.name != name or (entry.versions and entry.newest not in entry.versions):
        raise ValueError(name)
    return entry


def _derivation(body: dict[str, Any]) -> Derivation | None:
    scrypt = body["scrypt"]
    if scrypt is None:
        return None
    return Derivation(salt=_bytes(scrypt["salt"]), n=int(scrypt["n"]), r=int(scrypt["r"]), p=int(scrypt["p"]))


def _mac(kek: bytes, body: bytes) -> bytes:
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"falaj keyring: mac").derive(kek)
    return hmac.digest(key, body, "sha256")


def _damaged(path: Path, why: str) -> KeyringDamaged:
    return KeyringDamaged(f"The keyring {path} cannot be used: {why}. Restore it from a backup.")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
