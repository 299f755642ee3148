"""What a key store is: named, versioned key-encryption keys that never leave it.

A store wraps and unwraps small secrets (data keys, Parquet's keys). The name of a key is bound into what it wraps, so a
wrapped secret cannot be used under another name. Names are not secret: whoever is authenticated may learn that a key
exists.

    RefusedError
    ├── KeyNameInvalid          a name that is not a key's path
    ├── KeyNotFound             no key of that name
    ├── KeyRevoked              its versions are destroyed; what they wrapped is gone for good
    ├── WrappedKeyInvalid       altered, truncated, swapped, or wrapped by another key
    ├── KeyringDamaged          the keyring's file is missing, truncated or altered
    ├── KeyEncryptionKeyWrong   the keyring was made with another key-encryption key
    └── KeyFileRefused          a key-encryption key's file that is missing, readable by others or of the wrong size
    FalajError
    └── KeyStoreUnavailable     the broker is down, Vault is sealed: exit code 1
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
MAX_NAME_CHARS = 200
MAX_SECRET_BYTES = 64 * 1024
MAX_PURPOSES = 64
MAX_WORD_CHARS = 100
_SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_SEALED_MIN_BYTES = 12 + 16  # a nonce and a tag


class KeyNameInvalid(RefusedError):
    """A name that is not a key's path."""


class KeyNotFound(RefusedError):
    """No key of that name."""


class KeyRevoked(RefusedError):
    """The key's versions are destroyed."""

    info: KeyInfo | None = None
    """How it was described, where the store still knows."""


class WrappedKeyInvalid(RefusedError):
    """A wrapped secret that was altered, truncated, swapped, or wrapped by another key."""


class KeyringDamaged(RefusedError):
    """The keyring's file is missing, truncated or altered."""


class KeyEncryptionKeyWrong(RefusedError):
    """The keyring was made with another key-encryption key."""


class KeyFileRefused(RefusedError):
    """A key-encryption key's file that cannot be used as it lies there."""


class KeyStoreUnavailable(FalajError):
    """The store cannot be asked now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyInfo:
    """A key as the policy sees it; set when the key is created and authenticated together with it.

    Raises:
        KeyNameInvalid: the name is not a path of letters, digits, `_`, `-` and `.`.
        InvalidRequest: another attribute is out of its range.
    """

    name: str
    column_class: str = "internal"
    purposes: tuple[str, ...] = ()
    """What the key may be used for, sorted; empty is any purpose."""
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
        """The description in a JSON object.

        Raises:
            InvalidRequest: the object is not such a description.
            KeyNameInvalid: its name is not a key's path.
        """
        words = ("name", "column_class", "region", "tenant")
        if isinstance(value, dict) and value.keys() == {*words, "purposes"}:
            purposes = value["purposes"]
            texts = [value[word] for word in words]
            if isinstance(purposes, list) and all(isinstance(text, str) for text in (*texts, *purposes)):
                return cls(**dict(zip(words, texts, strict=True)), purposes=tuple(purposes))
        raise InvalidRequest("A key is described by name, column_class, purposes, region and tenant.")

    def plain(self) -> dict[str, object]:
        """The description as a JSON object."""
        return {**asdict(self), "purposes": list(self.purposes)}

    def canonical(self) -> bytes:
        """The one byte string of this description, for authentication."""
        return canonical(self.plain())


class KeyStore(Protocol):
    """Named, versioned keys that wrap small secrets.

    Every method may raise KeyStoreUnavailable, and AccessDenied or Unauthenticated where the store asks a policy.
    """

    def ensure(self, info: KeyInfo) -> None:
        """Create a key if it is absent; changed attributes update its description.

        Raises:
            KeyRevoked: a key of that name was revoked; names are not used twice.
        """

    def info(self, name: str) -> KeyInfo:
        """The description of a key.

        Raises:
            KeyNotFound, KeyRevoked.
        """

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt up to 64 KiB under the newest version: text `<scheme>:v<version>:<base64>`.

        Raises:
            KeyNotFound, KeyRevoked.
            InvalidRequest: the secret is empty or too long.
        """

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt what `wrap` gave under the same name.

        Raises:
            KeyNotFound, KeyRevoked.
            WrappedKeyInvalid: altered, truncated, or wrapped under another name.
        """

    def rewrap(self, name: str, wrapped: str) -> str:
        """The same secret under the newest version, without showing it to the caller.

        Raises:
            KeyNotFound, KeyRevoked, WrappedKeyInvalid.
        """

    def rotate(self, name: str) -> int:
        """Add a version for what is wrapped from now on; gives its number.

        Raises:
            KeyNotFound, KeyRevoked.
        """

    def revoke(self, name: str) -> None:
        """Destroy every version: what it wrapped is gone for good. The name stays taken.

        Raises:
            KeyNotFound, KeyRevoked.
        """

    def names(self) -> list[str]:
        """The names of the living keys, sorted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapped:
    """The parts of a wrapped secret's text."""

    version: int
    sealed: bytes
    """Nonce, ciphertext and tag."""


def check_name(name: object) -> str:
    """The name, if it is a key's path.

    Raises:
        KeyNameInvalid: it is not.
    """
    if isinstance(name, str) and len(name) <= MAX_NAME_CHARS and _NAME.fullmatch(name):
        return name
    shown = ascii(name)[:MAX_NAME_CHARS] if isinstance(name, str) else type(name).__name__
    raise KeyNameInvalid(
        f"No key can be called {shown}. A name is a path such as features/income/personal: up to {MAX_NAME_CHARS} of "
        "A-Z a-z 0-9 _ - . and each part begins and ends with a letter, a digit or _."
    )


def check_secret(name: str, secret: bytes) -> None:
    """Raise InvalidRequest unless a store may be asked to wrap this."""
    if not 0 < len(secret) <= MAX_SECRET_BYTES:
        raise InvalidRequest(
            f"Key '{name}' wraps 1 to {MAX_SECRET_BYTES} bytes, got {len(secret)}. "
            "Encrypt data under a data key and wrap that."
        )


def write_wrapped(parts: Wrapped, *, scheme: str, altchars: bytes) -> str:
    """The text of a wrapped secret."""
    return f"{scheme}:v{parts.version}:{base64.b64encode(parts.sealed, altchars).decode()}"


def parse_wrapped(name: str, wrapped: object, *, scheme: str, altchars: bytes) -> Wrapped:
    """The parts of a wrapped secret's text.

    Only the one spelling that `write_wrapped` gives is taken: decoders that overlook stray bits or leading zeros would
    let an altered text pass.

    Raises:
        WrappedKeyInvalid: the text has another form.
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
        spelled = write_wrapped(parts, scheme=scheme, altchars=altchars)
        if len(sealed) > _SEALED_MIN_BYTES and spelled == wrapped:
            return parts
    raise WrappedKeyInvalid(
        f"What should be unwrapped with key '{name}' is not a whole `{scheme}:v<version>:<base64>` text. "
        "It was truncated, altered, or wrapped by another key store."
    )


def not_found(name: str) -> KeyNotFound:
    """The error of a key that there is not."""
    return KeyNotFound(
        f"No key '{name}'. A key is made by `ensure`, when something is first stored under it; was the name mistyped?"
    )


def not_this_key(name: str) -> WrappedKeyInvalid:
    """The error of a wrapped secret that fails authentication."""
    return WrappedKeyInvalid(
        f"A wrapped secret is not one of key '{name}': it was altered, or wrapped under another name or store. "
        "Restore it from a backup."
    )


def revoked(name: str, info: KeyInfo | None = None) -> KeyRevoked:
    """The error of a key that was revoked."""
    error = KeyRevoked(
        f"Key '{name}' was revoked: what it wrapped is gone for good, and the name stays taken. Use another name."
    )
    error.info = info
    return error


def canonical(value: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()
