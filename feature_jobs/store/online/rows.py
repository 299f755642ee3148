"""How a view's rows lie in the online store: entity keys hashed, values packed by type and sealed by class.

    event (8) | created (8) | seq (8) | flags (1) | layout (2) | values

The three numbers are big-endian and counted from -2^63, so that bytes compare as (event, created, seq) do, whatever
engine compares them. `layout` says which version of the view wrote the row (`online_meta.py`).

An entity's key is replaced by an address (`online_addresses.py`). Public values lie as they are; those of every other
class are one AES-256-GCM value together, bound to view, class, entity and header, so that none can be moved to another
entity or made younger. Data keys are made anew with every materialisation and wrapped under `online/<view>/<class>`;
the addresses' key stays, wrapped under the internal one, so that a row that came during a materialisation keeps its
place.
"""

from __future__ import annotations

import functools
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from cryptography.exceptions import InvalidTag

from cluster.errors import ArtifactTampered
from cluster.security.encryption.envelope import NONCE_BYTES, ValueCipher, place_of
from cluster.security.keys.store import KeyStore
from feature_jobs.store.catalog.protection import online_key
from feature_jobs.store.definitions.views import Sensitivity
from feature_jobs.store.online.addresses import Addresses
from feature_jobs.store.online.layout import Layout, Lists, Plan, columns_of, with_lists
from feature_jobs.store.types.schema import PROVISIONAL

RANK_BYTES = 24
"""Of a header: what orders rows."""
BLOCK_ROWS = 8
"""From so many rows on, going by columns pays."""
ENTITY = "entity"
"""Stands for the addresses' key among the wrapped ones."""
_OFFSET = 1 << 63
_HEADER = struct.Struct(">QQQBH")
_DELETED, _LOOSE = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRow:
    """What a view says of one entity; of a deleted one, when it ceased."""

    keys: tuple[int | str, ...]
    event_us: int
    created_us: int
    seq: int
    values: Sequence[Any]
    """In the order of the view's fields; of a deleted row none."""
    deleted: bool = False


Found = tuple[int, int, bool, Sequence[Any]]
"""Event and availability in microseconds, whether no value is null, and the values."""


@dataclass(frozen=True, slots=True)
class Block:
    """What rows say that are all there, without a null among them, column by column."""

    moments: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """(rows, 2): event and creation in microseconds."""
    columns: list[list[Any]]

    def within(self, oldest_us: int, newest_us: int) -> bool:
        """Whether all events are of that time at least, and all was known by then."""
        return bool(self.moments[:, 0].min() >= oldest_us and self.moments.max() <= newest_us)

    def times(self) -> Iterator[tuple[int, int]]:
        """Event and availability of each row in microseconds."""
        return zip(self.moments[:, 0].tolist(), self.moments.max(axis=1).tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class Header:
    """A row's times and kind."""

    event_us: int
    created_us: int
    seq: int
    deleted: bool
    layout: int


@dataclass(frozen=True, slots=True)
class Horizon:
    """What a version of a feature table holds: rows up to a sequence number, pushes up to a number in their log."""

    seq: int
    offset: int

    def covers(self, seq: int) -> bool:
        """Whether a row of the online store is in that version."""
        return seq - PROVISIONAL <= self.offset if seq >= PROVISIONAL else seq <= self.seq


EVERYTHING = Horizon(PROVISIONAL, PROVISIONAL)


def header_of(packed: bytes) -> Header:
    """A stored row's header."""
    event, created, seq, flags, layout = _HEADER.unpack_from(packed)
    return Header(event - _OFFSET, created - _OFFSET, seq - _OFFSET, bool(flags & _DELETED), layout)


def rank_of(row: OnlineRow) -> bytes:
    """What orders a row, as the engines compare it."""
    return struct.pack(">QQQ", row.event_us + _OFFSET, row.created_us + _OFFSET, row.seq + _OFFSET)


class RowCipher:
    """Packs and unpacks the rows of one materialisation of a view."""

    def __init__(self, view: str, hash_key: bytes, ciphers: Mapping[str, ValueCipher]) -> None:
        self.addresses = Addresses(hash_key).of
        self._ciphers = {
            name: (cipher, place_of(online_key(view, name), b"")) for name, cipher in ciphers.items()
        }

    @classmethod
    def create(
        cls, store: KeyStore, view: str, classes: Iterable[str], *, hash_key: bytes | None = None
    ) -> tuple[RowCipher, dict[str, str]]:
        """New data keys, and their wrapped text to keep beside the rows; the addresses' key may be one of before.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
        """
        hash_key = secrets.token_bytes(32) if hash_key is None else hash_key
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
        ciphers = {
            name: ValueCipher.open(store, online_key(view, name), wrapped[name])
            for name in classes
            if name != Sensitivity.PUBLIC
        }
        return cls(view, open_hash_key(store, view, wrapped), ciphers)

    def address(self, entity: Sequence[int | str]) -> bytes:
        """Where an entity's row lies."""
        return self.addresses([entity])[0]

    def pack(self, address: bytes, row: OnlineRow, layout: Layout, number: int) -> bytes:
        """A row as it lies in the store, in the layout of that number."""
        loose = layout.is_loose(row.values)
        header = rank_of(row) + struct.pack(
            ">BH", (_DELETED if row.deleted else 0) | (_LOOSE if loose else 0), number
        )
        if row.deleted:
            return header
        parts = [
            self._sealed(name, group, address + header)
            for name, group in zip(layout.classes, layout.groups(row.values, loose=loose), strict=True)
        ]
        return header + (parts[0] if len(parts) == 1 else msgpack.packb(parts))

    def unpack(
        self, addresses: Sequence[bytes], rows: Sequence[bytes | None], plans: Sequence[Plan]
    ) -> list[Found | None]:
        """What stored rows say; none where there is no row. A deleted entity's row has its times and no values.

        Raises:
            ArtifactTampered: a value was altered, or belongs to another entity, view or time.
        """
        found: list[Found | None] = []
        header, size, first = _HEADER.unpack_from, _HEADER.size, _HEADER.size + NONCE_BYTES
        number, address = -1, b""
        values: Sequence[Any]
        lists: Lists = ()
        try:
            for address, packed in zip(addresses, rows, strict=True):
                if packed is None:
                    found.append(None)
                    continue
                event, created, _, flags, layout = header(packed)
                if layout != number:
                    plan, number = plans[layout], layout
                    decrypt, place, fixed, lists = self._single(plan)
                if flags == 0 and fixed is not None:  # the common case, without a call that is not needed
                    bound = place + address + packed[:size]
                    values = fixed.unpack(decrypt(packed[size:first], packed[first:], bound))
                    if lists:
                        values = with_lists(values, lists)
                elif flags & _DELETED:
                    values = ()
                else:
                    values = self._values(address, packed, plan, loose=bool(flags))
                known = event if event > created else created
                found.append((event - _OFFSET, known - _OFFSET, plan.complete and not flags, values))
        except (InvalidTag, ValueError, struct.error) as error:
            raise ArtifactTampered(
                f"The online row at {address!r} was altered or belongs elsewhere."
            ) from error
        return found

    def block(
        self, addresses: Sequence[bytes], rows: Sequence[bytes | None], plans: Sequence[Plan]
    ) -> Block | None:
        """What `unpack` says, column by column, which is faster; none where it is for `unpack` to say: rows are few,
        missing, deleted, altered, of several layouts, loose (`Layout.is_loose`), or not of fixed width."""
        if len(rows) < BLOCK_ROWS:
            return None
        try:
            joined, size = b"".join(rows), len(rows[0])  # type: ignore[arg-type]
            table = np.frombuffer(joined, np.uint8).reshape(len(rows), size)
            _, _, _, flags, layout = _HEADER.unpack_from(joined)
            kind = joined[RANK_BYTES : _HEADER.size]
            if flags or table[:, RANK_BYTES : _HEADER.size].tobytes() != kind * len(rows):
                return None
            decrypt, place, fixed, lists = self._single(plans[layout])
            if fixed is None:
                return None
            parts = zip(addresses, _split(size).iter_unpack(joined), strict=True)
            contents = [
                decrypt(nonce, sealed, place + address + header) for address, (header, nonce, sealed) in parts
            ]
        except (InvalidTag, TypeError, ValueError, struct.error):  # a missing row is no bytes
            return None
        columns = columns_of(b"".join(contents), fixed)
        for position, element in lists:
            packed = np.frombuffer(b"".join(columns[position]), element)
            columns[position] = list(packed.reshape(len(rows), -1))
        return Block(_moments(table), columns)

    def _single(self, plan: Plan) -> tuple[Any, bytes, struct.Struct | None, Lists]:
        """How to decrypt a row that is one sealed part of fixed type in the wanted order; nothing for any other."""
        if plan.order is not None:
            return None, b"", None, ()
        _, name, fixed, lists = plan.parts[0]
        if name == "public" or fixed is None:
            return None, b"", None, ()
        cipher, place = self._ciphers[name]
        return cipher.decrypt_raw, place, fixed, lists

    def _values(self, address: bytes, packed: bytes, plan: Plan, *, loose: bool) -> Sequence[Any]:
        body, bound = packed[_HEADER.size :], address + packed[: _HEADER.size]
        stored = (body,) if plan.single else msgpack.unpackb(body)
        groups: dict[int, Sequence[Any]] = {}
        for part, name, fixed, lists in plan.parts:
            content = stored[part]
            if name != "public":
                cipher, place = self._ciphers[name]
                content = cipher.decrypt(content, place + bound)
            values = msgpack.unpackb(content) if loose or fixed is None else fixed.unpack(content)
            groups[part] = with_lists(values, lists) if lists else values
        if plan.order is None:
            return groups[0]
        return [None if place is None else groups[place[0]][place[1]] for place in plan.order]

    def _sealed(self, name: str, group: bytes, bound: bytes) -> bytes:
        if name == Sensitivity.PUBLIC:
            return group
        cipher, place = self._ciphers[name]
        return cipher.encrypt(group, place + bound)


def open_hash_key(store: KeyStore, view: str, wrapped: Mapping[str, str]) -> bytes:
    """The addresses' key; raises as the key store says."""
    return store.unwrap(online_key(view, Sensitivity.INTERNAL), wrapped[ENTITY])


def _moments(table: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Event and creation from rows of bytes."""
    counted = table[:, :16].copy().view(">u8").astype(np.uint64)
    return (counted ^ np.uint64(_OFFSET)).view(np.int64)


@functools.cache
def _split(size: int) -> struct.Struct:
    """Header, nonce, and ciphertext with tag, of a row of one sealed part that is so long."""
    return struct.Struct(f"{_HEADER.size}s{NONCE_BYTES}s{size - _HEADER.size - NONCE_BYTES}s")
