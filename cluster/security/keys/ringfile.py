"""The keyring's file: its format, and how it is replaced so that neither a crash nor a second writer loses a change.

One line of JSON in one spelling: a body with the keys, its SHA-256 (damage shows before any key is asked for) and its
HMAC under a key derived from the key-encryption key (an attacker without it can change nothing). What no file can tell
by itself is an older copy of it put back; keep the folder where only the broker's user writes.
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
from cluster.security.keys.kek import Derivation
from cluster.security.keys.store import KeyEncryptionKeyWrong, KeyInfo, KeyringDamaged, canonical
from cluster.synced import sync_folder

FORMAT = "falaj-keyring"
VERSION = 1
NONCE_BYTES = 12
_CHECK = b"falaj keyring: check"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A key: its description and its versions, each encrypted. A revoked one has none."""

    info: KeyInfo
    newest: int
    versions: Mapping[int, bytes] = field(repr=False)

    @property
    def revoked(self) -> bool:
        """Whether this is the tombstone of a key."""
        return not self.versions


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """What a keyring's file holds."""

    keys: Mapping[str, Entry]
    derivation: Derivation | None = None
    """How the key-encryption key comes from a passphrase; none if it comes from a file."""


def seal(key: bytes, data: bytes, bound: bytes) -> bytes:
    """AES-256-GCM with a random 96-bit nonce in front; `bound` is authenticated with it.

    Random nonces are safe for 2^32 messages under one key.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, data, bound)


def unseal(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    """What `seal` was given.

    Raises:
        InvalidTag: another key, another `bound`, or altered.
    """
    return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound)


def encode(ring: Ring, kek: bytes) -> bytes:
    """The file's bytes."""
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
    return _spell(body, mac=_mac(kek, canonical(body)))


def decode(raw: bytes, kek: bytes, path: Path) -> Ring:
    """What the file's bytes mean.

    Raises:
        KeyringDamaged: truncated, altered, or of another format.
        KeyEncryptionKeyWrong: the file is whole but `kek` is not its key.
    """
    body, mac = _body(raw, path)
    try:
        check = _bytes(body["check"])
        unseal(kek, check, _CHECK)
    except InvalidTag:
        raise KeyEncryptionKeyWrong(
            f"The keyring {path} was made with another key-encryption key or passphrase. Give the one it was made with."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not hmac.compare_digest(mac, _mac(kek, canonical(body))):
        raise _damaged(path, "it was changed by somebody without its key")
    try:
        return Ring(
            keys={str(name): _entry(name, value) for name, value in body["keys"].items()},
            derivation=_derivation(body),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, "its keys cannot be read") from error


def derivation_of(path: Path) -> Derivation | None:
    """How the key of the keyring at `path` comes from a passphrase; none if it comes from a file.

    Raises:
        KeyringDamaged: missing, truncated or altered.
    """
    body, _ = _body(read(path), path)
    try:
        return _derivation(body)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "its header cannot be read") from error


def read(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        KeyringDamaged: it is missing. A new empty one is never made silently.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KeyringDamaged(
            f"No keyring at {path}. Restore it from a backup; `Keyring.create` makes a new, empty one."
        ) from None


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one writer at a time change the keyring, over all processes; a killed one leaves no lock behind."""
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        # flock belongs to the open file: unlike lockf it also holds between threads.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def replace(path: Path, raw: bytes) -> None:
    """Replace the keyring by new bytes, whole or not at all. The caller holds the lock."""
    for torn in path.parent.glob(f".{path.name}.*.tmp"):
        torn.unlink()  # a writer was killed: under the lock no other can be at work
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


def _spell(body: dict[str, Any], *, mac: bytes) -> bytes:
    digest = hashlib.sha256(canonical(body)).digest()
    whole = {"format": FORMAT, "version": VERSION, "body": body, "sha256": _text(digest), "mac": _text(mac)}
    return canonical(whole) + b"\n"


def _body(raw: bytes, path: Path) -> tuple[dict[str, Any], bytes]:
    """The body and its MAC, from a file that is as it was written or was changed with skill."""
    try:
        whole = json.loads(raw)
        if whole["format"] != FORMAT or whole["version"] != VERSION:
            raise _damaged(
                path, f"it is not of format {FORMAT} {VERSION}; was it written by another release?"
            )
        body, mac = whole["body"], _bytes(whole["mac"])
        if isinstance(body, dict) and _spell(body, mac=mac) == raw:
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
