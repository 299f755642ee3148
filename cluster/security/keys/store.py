"""The protocol of a key store: named, versioned key-encryption keys that never leave the store.

A store wraps and unwraps small secrets, such as data keys and Parquet's keys. The name of a key is bound into the
wrapped secret, so the secret cannot be used under another name. Key names are not secret: every authenticated principal
may learn that a key exists.

    RefusedError
    ├── KeyNameInvalid          the name is not a valid path of a key
    ├── KeyNotFound             no key has this name
    ├── KeyRevoked              the key's versions are destroyed; the secrets that it wrapped are lost
    ├── WrappedKeyInvalid       a wrapped secret was altered, truncated, swapped, or wrapped by another key
    ├── KeyringDamaged          the keyring's file is missing, truncated or altered
    ├── KeyEncryptionKeyWrong   the keyring was made with another key-encryption key
    └── KeyFileRefused          a key-encryption key's file is missing, readable by others or of the wrong size
    FalajError
    └── KeyStoreUnavailable     the broker is down, or Vault is sealed: exit code 1
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import asdict, dataclass
from typing import Protocol

from cluster.errors import FalajError, InvalidRequest, RefusedError

COLUMN_CLASSES = ("public", "internal", "personal", "sensitive")
"""Column classes, from the lowest to the highest sensitivity."""
MAX_NAME_CHARS = 200
MAX_SECRET_BYTES = 64 * 1024
MAX_PURPOSES = 64
MAX_WORD_CHARS = 100
_SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_SEALED_MIN_BYTES = 12 + 16  # a nonce and a tag


class KeyNameInvalid(RefusedError):
    """The name is not a valid path of a key."""


class KeyNotFound(RefusedError):
    """No key has this name."""


class KeyRevoked(RefusedError):
    """The key's versions are destroyed."""

    info: KeyInfo | None = None
    """Description of the revoked key, if the store still has it."""


class WrappedKeyInvalid(RefusedError):
    """A wrapped secret was altered, truncated, swapped, or wrapped by another key."""


class KeyringDamaged(RefusedError):
    """The keyring's file is missing, truncated or altered."""


class KeyEncryptionKeyWrong(RefusedError):
    """The keyring was made with another key-encryption key."""


class KeyFileRefused(RefusedError):
    """A key-encryption key's file cannot be used."""


class KeyStoreUnavailable(FalajError):
    """The key store cannot be reached now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyInfo:
    """Description of a key, by which the policies decide. It is authenticated together with the key.

    Raises:
        KeyNameInvalid: the name is not a path of letters, digits, `_`, `-` and `.`.
        InvalidRequest: another attribute is out of its range.
    """

    name: str
    column_class: str = "internal"
    purposes: tuple[str, ...] = ()
    """Permitted purposes of the key, sorted; empty permits every purpose."""
    region: str = "local"
    tenant: str = "default"

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.column_class not in COLUMN_CLASSES:
            raise InvalidRequest(
                f"Key '{self.name}': column_class must be one of {', '.join(COLUMN_CLASSES)}, "
                f"got {self.column_class!r}."
            )
        purposes: object = self.purposes
        if not isinstance(purposes, tuple) or len(purposes) > MAX_PURPOSES:
            raise InvalidRequest(
                f"Key '{self.name}': purposes must be up to {MAX_PURPOSES} words in a tuple."
            )
        for word in (*self.purposes, self.region, self.tenant):
            if not isinstance(word, str) or not 0 < len(word) <= MAX_WORD_CHARS or not word.isprintable():
                raise InvalidRequest(
                    f"Key '{self.name}': purposes, region and tenant must be printable words of at most "
                    f"{MAX_WORD_CHARS} characters."
                )
        object.__setattr__(self, "purposes", tuple(sorted(set(self.purposes))))

    @classmethod
    def from_plain(cls, value: object) -> KeyInfo:
        """Return the description in a JSON object.

        Raises:
            InvalidRequest: the object is not a key's description.
            KeyNameInvalid: the name is not a valid path of a key.
        """
        names = ("name", "column_class", "region", "tenant")
        if isinstance(value, dict) and value.keys() == {*names, "purposes"}:
            purposes = value["purposes"]
            texts = [value[name] for name in names]
            if isinstance(purposes, list) and all(isinstance(text, str) for text in (*texts, *purposes)):
                return cls(**dict(zip(names, texts, strict=True)), purposes=tuple(purposes))
        raise InvalidRequest(
            "A key's description must have exactly name, column_class, purposes, region and tenant."
        )

    def plain(self) -> dict[str, object]:
        """Return the description as a JSON object."""
        return {**asdict(self), "purposes": list(self.purposes)}

    def canonical(self) -> bytes:
        """Return the canonical bytes of this description, for authentication."""
        return canonical(self.plain())


class KeyStore(Protocol):
    """Named, versioned keys that wrap small secrets.

    Every method may raise KeyStoreUnavailable. It may raise AccessDenied or Unauthenticated if the store checks a
    policy.
    """

    def ensure(self, info: KeyInfo) -> None:
        """Create a key if it does not exist. If it exists with another description, update the description.

        Raises:
            KeyRevoked: a key with this name was revoked. Names are never used again.
        """

    def info(self, name: str) -> KeyInfo:
        """Return the description of a key.

        Raises:
            KeyNotFound, KeyRevoked: the key does not exist, or was revoked.
        """

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt up to 64 KiB with the newest version of the key, and return `<scheme>:v<version>:<base64>`.

        Raises:
            KeyNotFound, KeyRevoked: the key does not exist, or was revoked.
            InvalidRequest: the secret is empty or too long.
        """

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt the result of `wrap` under the same name.

        Raises:
            KeyNotFound, KeyRevoked: the key does not exist, or was revoked.
            WrappedKeyInvalid: the text was altered, truncated, or wrapped under another name.
        """

    def rewrap(self, name: str, wrapped: str) -> str:
        """Return the same secret wrapped with the newest version of the key, without revealing it to the caller.

        Raises:
            KeyNotFound, KeyRevoked, WrappedKeyInvalid: see `unwrap`.
        """

    def rotate(self, name: str) -> int:
        """Add a version and return its number. Every later `wrap` uses the new version.

        Raises:
            KeyNotFound, KeyRevoked: the key does not exist, or was revoked.
        """

    def revoke(self, name: str) -> None:
        """Destroy every version. The secrets that the key wrapped are lost, and its name cannot be used again.

        Raises:
            KeyNotFound, KeyRevoked: the key does not exist, or was revoked.
        """

    def names(self) -> list[str]:
        """Return the names of the keys, sorted, without revoked keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapped:
    """The parts of a wrapped secret's text."""

    version: int
    sealed: bytes
    """Nonce, ciphertext and tag."""


def check_name(name: object) -> str:
    """Return the name if it is a valid path of a key.

    Raises:
        KeyNameInvalid: the name is not a valid path of a key.
    """
    if isinstance(name, str) and len(name) <= MAX_NAME_CHARS and _NAME.fullmatch(name):
        return name
    shown = ascii(name)[:MAX_NAME_CHARS] if isinstance(name, str) else type(name).__name__
    raise KeyNameInvalid(
        f"Invalid name of a key: {shown}. A name is a path such as features/income/personal: up to {MAX_NAME_CHARS} "
        "of A-Z a-z 0-9 _ - . and each part begins and ends with a letter, a digit or _."
    )


def check_secret(name: str, secret: bytes) -> None:
    """Require that a store can wrap this secret.

    Raises:
        InvalidRequest: the secret is empty or too long.
    """
    if not 0 < len(secret) <= MAX_SECRET_BYTES:
        raise InvalidRequest(
            f"Key '{name}' wraps 1 to {MAX_SECRET_BYTES} bytes, got {len(secret)}. "
            "Encrypt data under a data key and wrap that."
        )


def write_wrapped(parts: Wrapped, *, scheme: str, altchars: bytes) -> str:
    """Return the text of a wrapped secret."""
    return f"{scheme}:v{parts.version}:{base64.b64encode(parts.sealed, altchars).decode()}"


def parse_wrapped(name: str, wrapped: object, *, scheme: str, altchars: bytes) -> Wrapped:
    """Return the parts of a wrapped secret's text.

    It accepts only the text that `write_wrapped` writes. A decoder that ignores extra bits or leading zeros would
    accept an altered text.

    Raises:
        WrappedKeyInvalid: the text has another format.
    """
    match_ = (
        re.fullmatch(rf"{scheme}:v([1-9][0-9]{{0,8}}):([!-~]+)", wrapped)
        if isinstance(wrapped, str)
        else None
    )
    if match_ is not None:
        try:
            sealed = base64.b64decode(match_[2], altchars, validate=True)
        except (binascii.Error, ValueError):
            sealed = b""
        parts = Wrapped(version=int(match_[1]), sealed=sealed)
        canonical_text = write_wrapped(parts, scheme=scheme, altchars=altchars)
        if len(sealed) > _SEALED_MIN_BYTES and canonical_text == wrapped:
            return parts
    raise WrappedKeyInvalid(
        f"The text to unwrap with key '{name}' is not a complete `{scheme}:v<version>:<base64>` text. "
        "It was truncated, altered, or wrapped by another key store. Restore it from a backup."
    )


def not_found(name: str) -> KeyNotFound:
    """Return the error for a key that does not exist."""
    return KeyNotFound(
        f"No key '{name}'. A key is created when data is first stored under it. Check the name."
    )


def not_this_key(name: str) -> WrappedKeyInvalid:
    """Return the error for a wrapped secret that fails authentication."""
    return WrappedKeyInvalid(
        f"A wrapped secret does not belong to key '{name}': it was altered, or wrapped under another name or store. "
        "Restore it from a backup."
    )


def revoked(name: str, info: KeyInfo | None = None) -> KeyRevoked:
    """Return the error for a revoked key."""
    error = KeyRevoked(
        f"Key '{name}' was revoked: the secrets that it wrapped are lost, and its name cannot be used again. "
        "Use another name."
    )
    error.info = info
    return error


def canonical(value: object) -> bytes:
    """Return canonical JSON: with sorted keys, without spaces, in ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()
