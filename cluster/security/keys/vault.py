"""Keys in HashiCorp Vault: Transit holds and uses them, KV version 2 holds their descriptions and tombstones.

A policy for jobs grants `update` on `transit/encrypt/<prefix>.*` and `transit/decrypt/<prefix>.*` and `read` on
`secret/data/<prefix>/keys/*`. Never `create` on `transit/encrypt`: there Vault makes a missing key silently.

The name is authenticated with every secret (`associated_data`, Vault 1.9 or later). Transit's own `rewrap` takes no
associated data (hashicorp/vault#31791), so `rewrap` here decrypts and encrypts: the secret passes through this process,
not to the caller.
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
from cluster.security.keys.vault_session import body, translated

SCHEME = "vault"
ALTCHARS = b"+/"
KEY_TYPE = "aes256-gcm96"
_ATTEMPTS = 20
"""More than there are writers of one description at a time: each round, one of them succeeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """What KV holds of a key."""

    info: KeyInfo
    revoked: bool
    version: int
    """KV's, for check-and-set."""


class VaultKeyStore:
    """A KeyStore in Vault.

    Args:
        client: logged in; `vault_session.keep_renewed` keeps it so.
        mount: of the Transit engine.
        kv_mount: of the KV version 2 engine.
        prefix: in front of every name, so that one Vault can serve several installations.

    Raises:
        KeyNameInvalid: the prefix could not begin a key's name.
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
            if self._write(info, is_revoked=False, seen=record):
                return
        raise _contended(info.name)

    def info(self, name: str) -> KeyInfo:
        """The description of a key."""
        record = self._record(name)
        if record is None:
            raise not_found(name)
        if record.revoked:
            raise revoked(name, record.info)
        return record.info

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt a secret under the newest version."""
        self.info(name)  # or Vault might make a key that is not there
        check_secret(name, secret)
        with translated(f"encrypt with key '{name}'"):
            answer = self._transit.encrypt_data(
                name=self._flat(name),
                plaintext=_text(secret),
                associated_data=_text(name.encode()),
                mount_point=self._mount,
            )
        wrapped = str(body(answer, "data").get("ciphertext"))
        parse_wrapped(name, wrapped, scheme=SCHEME, altchars=ALTCHARS)
        return wrapped

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt a wrapped secret."""
        flat = self._flat(name)
        try:
            # Vault itself takes v0 for v1 and overlooks stray bits of base64: one spelling only.
            parse_wrapped(name, wrapped, scheme=SCHEME, altchars=ALTCHARS)
            with translated(f"decrypt with key '{name}'"):
                answer = self._transit.decrypt_data(
                    name=flat,
                    ciphertext=wrapped,
                    associated_data=_text(name.encode()),
                    mount_point=self._mount,
                )
        except InvalidRequest:
            self.info(name)  # Vault says the same of a missing key: KeyNotFound and KeyRevoked come first
            raise not_this_key(name) from None
        return base64.b64decode(str(body(answer, "data").get("plaintext")), validate=True)

    def rewrap(self, name: str, wrapped: str) -> str:
        """Wrap a secret anew under the newest version."""
        return self.wrap(name, self.unwrap(name, wrapped))

    def rotate(self, name: str) -> int:
        """Add a version; gives the newest one's number (another's, if two rotate at once)."""
        self.info(name)
        flat = self._flat(name)
        with translated(f"rotate key '{name}'"):
            self._transit.rotate_key(name=flat, mount_point=self._mount)
            answer = self._transit.read_key(name=flat, mount_point=self._mount)
        return int(body(answer, "data")["latest_version"])

    def revoke(self, name: str) -> None:
        """Write the tombstone, then delete the key; can be repeated if it was cut off in between."""
        for _ in range(_ATTEMPTS):
            record = self._record(name)
            if record is None:
                raise not_found(name)
            if record.revoked:
                if not self._delete(name):
                    raise revoked(name)
                return
            if self._write(record.info, is_revoked=True, seen=record):
                self._delete(name)
                return
        raise _contended(name)

    def names(self) -> list[str]:
        """The names of the living keys, sorted."""
        try:
            with translated("list the keys"):
                answer = self._transit.list_keys(mount_point=self._mount)
        except KeyNotFound:
            return []
        found = (self._deep(str(flat)) for flat in body(answer, "data").get("keys", []))
        return sorted(name for name in found if name is not None)

    def _create(self, name: str) -> None:
        with translated(f"create key '{name}'"):
            self._transit.create_key(
                name=self._flat(name),
                key_type=KEY_TYPE,
                derived=False,
                convergent_encryption=False,
                exportable=False,
                allow_plaintext_backup=False,
                mount_point=self._mount,
            )

    def _delete(self, name: str) -> bool:
        """Delete the Transit key; gives whether there was one."""
        flat = self._flat(name)
        try:
            with translated(f"delete key '{name}'"):
                self._transit.read_key(name=flat, mount_point=self._mount)
                self._transit.update_key_configuration(
                    name=flat, deletion_allowed=True, mount_point=self._mount
                )
                self._transit.delete_key(name=flat, mount_point=self._mount)
        except KeyNotFound:
            return False
        return True

    def _record(self, name: str) -> _Record | None:
        """What KV holds of a key; none if it holds nothing.

        Raises:
            KeyStoreUnavailable: what it holds is not a description of this key.
        """
        try:
            with translated(f"read the description of key '{name}'"):
                answer = self._kv.read_secret_version(
                    path=self._path(name), mount_point=self._kv_mount, raise_on_deleted_version=True
                )
        except KeyNotFound:
            return None
        found = body(answer, "data")
        try:
            info = KeyInfo.from_plain(found["data"]["info"])
            if info.name == name:
                return _Record(
                    info=info,
                    revoked=found["data"]["revoked"] is True,
                    version=int(found["metadata"]["version"]),
                )
        except (KeyError, TypeError, ValueError):
            pass
        raise KeyStoreUnavailable(
            f"Vault's {self._kv_mount}/{self._path(name)} does not describe key '{name}'. Restore its former version."
        )

    def _write(self, info: KeyInfo, *, is_revoked: bool, seen: _Record | None) -> bool:
        """Write a description over the one seen; gives whether nobody else was faster."""
        content: dict[str, Any] = {"info": info.plain(), "revoked": is_revoked}
        with translated(f"describe key '{info.name}'"):
            try:
                self._kv.create_or_update_secret(
                    path=self._path(info.name),
                    secret=content,
                    cas=seen.version if seen else 0,
                    mount_point=self._kv_mount,
                )
            except vault_errors.InvalidRequest as error:
                if "check-and-set" in str(error):
                    return False
                raise
        return True

    def _path(self, name: str) -> str:
        return f"{self._prefix}/keys/{flatten(check_name(name))}"

    def _flat(self, name: str) -> str:
        return flatten(f"{self._prefix}/{check_name(name)}")

    def _deep(self, flat: str) -> str | None:
        """The name of a Transit key; none for a stranger's."""
        name = unflatten(flat)
        if not name.startswith(f"{self._prefix}/"):
            return None
        try:
            name = check_name(name.removeprefix(f"{self._prefix}/"))
        except KeyNameInvalid:
            return None
        return name if self._flat(name) == flat else None


def flatten(name: str) -> str:
    """A key's path as one word, for Transit's names hold no slash: `/` becomes `.` and `.` becomes `..`.

    Reversible, because no part of a path begins or ends with a dot.
    """
    return name.replace(".", "..").replace("/", ".")


def unflatten(flat: str) -> str:
    """The path that `flatten` was given."""
    return flat.replace("..", "\0").replace(".", "/").replace("\0", ".")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _contended(name: str) -> KeyStoreUnavailable:
    return KeyStoreUnavailable(f"The description of key '{name}' keeps changing under this call. Try again.")
