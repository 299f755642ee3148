"""How a view's rows lie in the online store: entity keys hashed, values sealed by class.

An entity's key is replaced by a keyed hash (BLAKE2b, RFC 7693), so a stolen file says nobody's name. Public values lie
as they are; those of every other class are one AES-256-GCM value together, bound to view, class, entity and times, so
that none can be moved to another entity or made younger. Data keys are made anew with every materialisation and wrapped
under `online/<view>/<class>`; the hash's key under the internal one.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack

from cluster.security.envelope import ValueCipher, place_of
from cluster.security.keys.store import KeyStore
from feature_jobs.store.definitions import Sensitivity

HASH_BYTES = 24
ENTITY = "entity"
"""Stands for the hash's key among the wrapped ones."""


def online_key(view: str, sensitivity: str) -> str:
    """The key of a view's online values of one class."""
    return f"online/{view}/{sensitivity}"


class RowCipher:
    """Packs and unpacks the rows of one materialisation of a view."""

    def __init__(self, view: str, hash_key: bytes, ciphers: Mapping[str, ValueCipher]) -> None:
        self._view = view
        self._hash_key = hash_key
        self._ciphers = ciphers

    @classmethod
    def create(cls, store: KeyStore, view: str, classes: Iterable[str]) -> tuple[RowCipher, dict[str, str]]:
        """New data keys, and their wrapped text to keep beside the rows.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
        """
        hash_key = secrets.token_bytes(32)
        wrapped = {ENTITY: store.wrap(online_key(view, Sensitivity.INTERNAL), hash_key)}
        ciphers = {}
        for name in classes:
            if name != Sensitivity.PUBLIC:
                ciphers[name], wrapped[name] = ValueCipher.create(store, online_key(view, name))
        return cls(view, hash_key, ciphers), wrapped

    @classmethod
    def open(
        cls, store: KeyStore, view: str, wrapped: Mapping[str, str], classes: Iterable[str]
    ) -> RowCipher:
        """The data keys of the classes that are wanted.

        Raises:
            KeyNotFound, KeyRevoked, WrappedKeyInvalid, AccessDenied: as the key store says.
        """
        hash_key = store.unwrap(online_key(view, Sensitivity.INTERNAL), wrapped[ENTITY])
        ciphers = {
            name: ValueCipher.open(store, online_key(view, name), wrapped[name])
            for name in classes
            if name != Sensitivity.PUBLIC
        }
        return cls(view, hash_key, ciphers)

    def address(self, entity: Sequence[int | str]) -> bytes:
        """Where an entity's row lies."""
        return hashlib.blake2b(msgpack.packb(entity), key=self._hash_key, digest_size=HASH_BYTES).digest()

    def pack(
        self, address: bytes, event_us: int, available_us: int, groups: Mapping[str, list[Any]]
    ) -> bytes:
        """A row from its values by class."""
        parts = {
            name: self._sealed(name, address, event_us, available_us, group) for name, group in groups.items()
        }
        return bytes(msgpack.packb([event_us, available_us, parts]))

    def unpack(
        self, address: bytes, packed: bytes, classes: Iterable[str]
    ) -> tuple[int, int, dict[str, list[Any]]]:
        """Times, and the values of the classes that are wanted.

        Raises:
            ArtifactTampered: a value was altered, or belongs to another entity, view or time.
        """
        event_us, available_us, parts = msgpack.unpackb(packed)
        groups = {name: self._opened(name, address, event_us, available_us, parts[name]) for name in classes}
        return event_us, available_us, groups

    def _sealed(self, name: str, address: bytes, event_us: int, available_us: int, group: list[Any]) -> Any:
        if name == Sensitivity.PUBLIC:
            return group
        place = self._place(name, address, event_us, available_us)
        return self._ciphers[name].encrypt(msgpack.packb(group), place)

    def _opened(self, name: str, address: bytes, event_us: int, available_us: int, part: Any) -> list[Any]:
        if name == Sensitivity.PUBLIC:
            return list(part)
        place = self._place(name, address, event_us, available_us)
        return list(msgpack.unpackb(self._ciphers[name].decrypt(part, place)))

    def _place(self, name: str, address: bytes, event_us: int, available_us: int) -> bytes:
        return place_of(online_key(self._view, name), address + struct.pack(">qq", event_us, available_us))
