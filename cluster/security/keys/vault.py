"""Keys in HashiCorp Vault. Transit stores and uses the keys; KV version 2 stores their descriptions and tombstones.

A Vault policy for jobs grants `update` on `transit/encrypt/<prefix>.*` and `transit/decrypt/<prefix>.*`, and `read` on
`secret/data/<prefix>/keys/*`. Never grant `create` on `transit/encrypt`: Vault then creates a missing key silently.

The name is authenticated with every secret (`associated_data`, Vault 1.9 or later). Transit's own `rewrap` takes no
associated data (hashicorp/vault#31791). So `rewrap` in this module decrypts and encrypts the secret. This process sees
the secret, but the caller does not get it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import hvac  # type: ignore[import-untyped]
from hvac import exceptions as vault_errors

from cluster.errors import InvalidRequest
from cluster.security.keys.store import (
    KeyInfo,
    KeyNameInvalid,
    KeyNotFound,
    KeyStoreUnavailable,
    check_name,
    check_secret,
    not_found,
    not_this_key,
    parse_wrapped,
    revoked,
)
from cluster.security.keys.vault_session import require_part, translated_errors

SCHEME = "vault"
ALTCHARS = b"+/"
KEY_TYPE = "aes256-gcm96"
_ATTEMPTS = 20
"""Largest number of attempts to write a description. One writer succeeds in each round, so the number must be greater
than the number of concurrent writers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """What KV stores about a key."""

    info: KeyInfo
    revoked: bool
    version: int
    """Version in KV, for check-and-set."""


class VaultKeyStore:
    """A KeyStore in Vault.

    Args:
        client: a client that is logged in; `vault_session.keep_renewed` renews the login.
        mount: mount of the Transit engine.
        kv_mount: mount of the KV version 2 engine.
        prefix: prefix of every key name, so that one Vault can serve several installations.

    Raises:
        KeyNameInvalid: a key's name cannot begin with the prefix.
    """

    def __init__(
        self, client: hvac.Client, mount: str = "transit", kv_mount: str = "secret", prefix: str = "falaj"
    ) -> None:
        self._client = client
        self._transit = client.secrets.transit
        self._kv = client.secrets.kv.v2
        self._mount = mount
        self._kv_mount = kv_mount
        self._prefix = check_name(prefix)

    def __repr__(self) -> str:
        return f"VaultKeyStore(mount={self._mount!r}, kv_mount={self._kv_mount!r}, prefix={self._prefix!r})"

    def ensure(self, info: KeyInfo) -> None:
        """Create a key, or update its description."""
        for _ in range(_ATTEMPTS):
            record = self._record(info.name)
            if record is not None and record.revoked:
                raise revoked(info.name)
            if record is not None and record.info == info:
                return
            if record is None:
                self._create(info.name)
            if self._write(info, is_revoked=False, previous=record):
                return
        raise _contended(info.name)

    def info(self, name: str) -> KeyInfo:
        """Return the description of a key."""
        record = self._record(name)
        if record is None:
            raise not_found(name)
        if record.revoked:
            raise revoked(name, record.info)
        return record.info

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt a secret with the newest version of the key."""
        self.info(name)  # it raises an error for a missing key, which Vault might otherwise create
        check_secret(name, secret)
        with translated_errors(f"encrypt with key '{name}'"):
            answer = self._transit.encrypt_data(
                name=self._transit_name(name),
                plaintext=_text(secret),
                associated_data=_text(name.encode()),
                mount_point=self._mount,
            )
        wrapped = str(require_part(answer, "data").get("ciphertext"))
        parse_wrapped(name, wrapped, scheme=SCHEME, altchars=ALTCHARS)
        return wrapped

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt a wrapped secret."""
        flat = self._transit_name(name)
        try:
            # Accept only the exact text: Vault itself reads v0 as v1 and ignores extra bits of base64.
            parse_wrapped(name, wrapped, scheme=SCHEME, altchars=ALTCHARS)
            with translated_errors(f"decrypt with key '{name}'"):
                answer = self._transit.decrypt_data(
                    name=flat,
                    ciphertext=wrapped,
                    associated_data=_text(name.encode()),
                    mount_point=self._mount,
                )
        except InvalidRequest:
            self.info(name)  # raises for a missing or revoked key, for which Vault gives the same error
            raise not_this_key(name) from None
        return base64.b64decode(str(require_part(answer, "data").get("plaintext")), validate=True)

    def rewrap(self, name: str, wrapped: str) -> str:
        """Wrap a secret again, with the newest version of the key."""
        return self.wrap(name, self.unwrap(name, wrapped))

    def rotate(self, name: str) -> int:
        """Add a version and return the newest version's number.

        After concurrent rotations, another caller may have added the newest version.
        """
        self.info(name)
        flat = self._transit_name(name)
        with translated_errors(f"rotate key '{name}'"):
            self._transit.rotate_key(name=flat, mount_point=self._mount)
            answer = self._transit.read_key(name=flat, mount_point=self._mount)
        return int(require_part(answer, "data")["latest_version"])

    def revoke(self, name: str) -> None:
        """Write the tombstone, then delete the key. After an interruption, it can be repeated."""
        for _ in range(_ATTEMPTS):
            record = self._record(name)
            if record is None:
                raise not_found(name)
            if record.revoked:
                if not self._delete(name):
                    raise revoked(name)
                return
            if self._write(record.info, is_revoked=True, previous=record):
                self._delete(name)
                return
        raise _contended(name)

    def names(self) -> list[str]:
        """Return the names of the keys, sorted, without revoked keys."""
        try:
            with translated_errors("list the keys"):
                answer = self._transit.list_keys(mount_point=self._mount)
        except KeyNotFound:
            return []
        names = (self._key_name(str(flat)) for flat in require_part(answer, "data").get("keys", []))
        return sorted(name for name in names if name is not None)

    def _create(self, name: str) -> None:
        with translated_errors(f"create key '{name}'"):
            self._transit.create_key(
                name=self._transit_name(name),
                key_type=KEY_TYPE,
                derived=False,
                convergent_encryption=False,
                exportable=False,
                allow_plaintext_backup=False,
                mount_point=self._mount,
            )

    def _delete(self, name: str) -> bool:
        """Delete the Transit key and return whether it existed."""
        flat = self._transit_name(name)
        try:
            with translated_errors(f"delete key '{name}'"):
                self._transit.read_key(name=flat, mount_point=self._mount)
                self._transit.update_key_configuration(
                    name=flat, deletion_allowed=True, mount_point=self._mount
                )
                self._transit.delete_key(name=flat, mount_point=self._mount)
        except KeyNotFound:
            return False
        return True

    def _record(self, name: str) -> _Record | None:
        """Return what KV stores about a key, or None if KV stores nothing about it.

        Raises:
            KeyStoreUnavailable: the stored data is not a description of this key.
        """
        try:
            with translated_errors(f"read the description of key '{name}'"):
                answer = self._kv.read_secret_version(
                    path=self._kv_path(name), mount_point=self._kv_mount, raise_on_deleted_version=True
                )
        except KeyNotFound:
            return None
        content = require_part(answer, "data")
        try:
            info = KeyInfo.from_plain(content["data"]["info"])
            if info.name == name:
                return _Record(
                    info=info,
                    revoked=content["data"]["revoked"] is True,
                    version=int(content["metadata"]["version"]),
                )
        except (KeyError, TypeError, ValueError):
            pass
        raise KeyStoreUnavailable(
            f"Vault's {self._kv_mount}/{self._kv_path(name)} does not describe key '{name}'. "
            "Restore its previous version."
        )

    def _write(self, info: KeyInfo, *, is_revoked: bool, previous: _Record | None) -> bool:
        """Write a description with check-and-set. Return False if another writer was faster."""
        content: dict[str, Any] = {"info": info.plain(), "revoked": is_revoked}
        with translated_errors(f"describe key '{info.name}'"):
            try:
                self._kv.create_or_update_secret(
                    path=self._kv_path(info.name),
                    secret=content,
                    cas=previous.version if previous else 0,
                    mount_point=self._kv_mount,
                )
            except vault_errors.InvalidRequest as error:
                if "check-and-set" in str(error):
                    return False
                raise
        return True

    def _kv_path(self, name: str) -> str:
        return f"{self._prefix}/keys/{flatten(check_name(name))}"

    def _transit_name(self, name: str) -> str:
        return flatten(f"{self._prefix}/{check_name(name)}")

    def _key_name(self, flat: str) -> str | None:
        """Return the name of a Transit key, or None if it is not a key of this installation."""
        name = unflatten(flat)
        if not name.startswith(f"{self._prefix}/"):
            return None
        try:
            name = check_name(name.removeprefix(f"{self._prefix}/"))
        except KeyNameInvalid:
            return None
        return name if self._transit_name(name) == flat else None


def flatten(name: str) -> str:
    """Return a key's path as one word: `/` becomes `.` and `.` becomes `..`. Transit's names cannot contain slashes.

    `unflatten` can reverse this, because no part of a path begins or ends with a dot.
    """
    return name.replace(".", "..").replace("/", ".")


def unflatten(flat: str) -> str:
    """Return the path of a flattened name."""
    return flat.replace("..", "\0").replace(".", "/").replace("\0", ".")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _contended(name: str) -> KeyStoreUnavailable:
    return KeyStoreUnavailable(f"The description of key '{name}' keeps changing during this call. Try again.")
