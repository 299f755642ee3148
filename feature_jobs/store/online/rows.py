"""The format of a view's rows in the online store: entity keys hashed, values packed by type and encrypted by class.

    event (8) | created (8) | seq (8) | flags (1) | layout (2) | values

The first three numbers are big-endian with an offset of 2^63. So in every engine, comparing bytes gives the same result
as comparing (event, created, seq). `layout` is the index of the layout in the view's meta (`meta.py`).

An address (`addresses.py`) replaces the entity's key. Public values are not encrypted. For every other class, the
values together are one AES-256-GCM ciphertext. Its AAD names view, class, entity and header, so no value can be moved
to another entity or be given a newer time. Each materialisation makes new data keys, which are wrapped under
`online/<view>/<class>`. The hash key of the addresses does not change, and is wrapped under the internal key. So a row
that is put during a materialisation keeps its address.
"""

from __future__ import annotations

import functools
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack
import numpy as np
from cryptography.exceptions import InvalidTag

from cluster.errors import ArtifactTampered
from cluster.security.encryption.envelope import NONCE_BYTES, ValueCipher, value_aad
from cluster.security.keys.store import KeyStore
from feature_jobs.store.catalog.protection import online_key
from feature_jobs.store.definitions.views import Sensitivity
from feature_jobs.store.online.addresses import Addresses
from feature_jobs.store.online.layout import Layout, Lists, Plan, columns_of, with_lists
from feature_jobs.store.types.schema import PROVISIONAL

RANK_BYTES = 24
"""Size of the rank: the first bytes of a header, by which rows are ordered."""
BLOCK_ROWS = 8
"""From this number of rows on, reading by column is faster than by row."""
ENTITY = "entity"
"""Name of the wrapped key with which addresses are hashed."""
_OFFSET = 1 << 63
_HEADER = struct.Struct(">QQQBH")
_DELETED, _LOOSE = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRow:
    """The values of one entity in a view. For a deleted entity, the time of the deletion."""

    keys: tuple[int | str, ...]
    event_us: int
    created_us: int
    seq: int
    values: Sequence[Any]
    """In the order of the view's fields; empty for a deleted entity."""
    deleted: bool = False


FoundRow: TypeAlias = tuple[int, int, bool, Sequence[Any]]
"""A row as it is read: `event_us, available_us, complete, values`.

The times are the event time and the availability in microseconds. `complete` says that the row has all wanted features
and none is null. `values` is empty for a deleted entity. It is a plain tuple because a NamedTuple takes 0.2 µs longer
to make, which is 13 % of the time to unpack a row.
"""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows, stored by column. All rows exist and have no null."""

    moments: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """(rows, 2): event time and created time in microseconds."""
    columns: list[list[Any]]

    def within(self, oldest_us: int, newest_us: int) -> bool:
        """Return whether no event is before `oldest_us` and every row was available by `newest_us`."""
        return bool(self.moments[:, 0].min() >= oldest_us and self.moments.max() <= newest_us)

    def times(self) -> Iterator[tuple[int, int]]:
        """Yield the event time and the availability of each row in microseconds."""
        return zip(self.moments[:, 0].tolist(), self.moments.max(axis=1).tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a stored row."""

    event_us: int
    created_us: int
    seq: int
    deleted: bool
    layout: int


@dataclass(frozen=True, slots=True)
class Horizon:
    """The rows that one version of a feature table has: up to an `ingest_seq`, and pushes up to a push-log number."""

    seq: int
    offset: int

    def covers(self, seq: int) -> bool:
        """Return whether the online row with this sequence number is in the table version."""
        return seq - PROVISIONAL <= self.offset if seq >= PROVISIONAL else seq <= self.seq


EVERYTHING = Horizon(PROVISIONAL, PROVISIONAL)
"""The horizon that covers every row."""


def header_of(packed: bytes) -> Header:
    """Return the header of a stored row."""
    event, created, seq, flags, layout = _HEADER.unpack_from(packed)
    return Header(event - _OFFSET, created - _OFFSET, seq - _OFFSET, bool(flags & _DELETED), layout)


def online_row(header: Header, found: FoundRow | None) -> OnlineRow:
    """Return a stored row without its keys."""
    values: Sequence[Any] = ()
    if found is not None:
        _, _, _, values = found
    return OnlineRow(
        keys=(),
        event_us=header.event_us,
        created_us=header.created_us,
        seq=header.seq,
        values=values,
        deleted=header.deleted,
    )


def rank_of(row: OnlineRow) -> bytes:
    """Return the rank of a row, which the engines compare as bytes."""
    return struct.pack(">QQQ", row.event_us + _OFFSET, row.created_us + _OFFSET, row.seq + _OFFSET)


class RowCipher:
    """Packs and unpacks the rows of one materialisation of a view."""

    def __init__(self, view: str, hash_key: bytes, ciphers: Mapping[str, ValueCipher]) -> None:
        self.addresses = Addresses(hash_key).of
        self._ciphers = {
            name: (cipher, value_aad(online_key(view, name), b"")) for name, cipher in ciphers.items()
        }

    @classmethod
    def create(
        cls, store: KeyStore, view: str, classes: Iterable[str], *, hash_key: bytes | None = None
    ) -> tuple[RowCipher, dict[str, str]]:
        """Create new data keys; return the cipher and the wrapped keys to store in the meta.

        Args:
            store: wraps the keys.
            view: name of the view.
            classes: classes of the view's fields.
            hash_key: hash key of the previous generation's addresses; None creates a new hash key.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: the key store refuses a key.
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
        """Unwrap the data keys of the given classes.

        Raises:
            KeyNotFound, KeyRevoked, WrappedKeyInvalid, AccessDenied: the key store refuses a key.
        """
        ciphers = {
            name: ValueCipher.open(store, online_key(view, name), wrapped[name])
            for name in classes
            if name != Sensitivity.PUBLIC
        }
        return cls(view, open_hash_key(store, view, wrapped), ciphers)

    def address(self, entity: Sequence[int | str]) -> bytes:
        """Return the address of an entity."""
        return self.addresses([entity])[0]

    def pack(self, address: bytes, row: OnlineRow, layout: Layout, number: int) -> bytes:
        """Return a row as it is stored, packed in a layout with the given index."""
        loose = layout.is_loose(row.values)
        header = rank_of(row) + struct.pack(
            ">BH", (_DELETED if row.deleted else 0) | (_LOOSE if loose else 0), number
        )
        if row.deleted:
            return header
        parts = [
            self._encrypted(name, group, address + header)
            for name, group in zip(layout.classes, layout.groups(row.values, loose=loose), strict=True)
        ]
        return header + (parts[0] if len(parts) == 1 else msgpack.packb(parts))

    def unpack(
        self, addresses: Sequence[bytes], rows: Sequence[bytes | None], plans: Sequence[Plan]
    ) -> list[FoundRow | None]:
        """Decrypt and unpack stored rows; None for a missing row. A deleted entity's row has times and no values.

        Raises:
            ArtifactTampered: a value was altered, or belongs to another entity, view or time.
        """
        found: list[FoundRow | None] = []
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
                    decrypt, class_aad, fixed, lists = self._single(plan)
                if flags == 0 and fixed is not None:  # the common case, with as few calls as possible
                    aad = class_aad + address + packed[:size]
                    values = fixed.unpack(decrypt(packed[size:first], packed[first:], aad))
                    if lists:
                        values = with_lists(values, lists)
                elif flags & _DELETED:
                    values = ()
                else:
                    values = self._values(address, packed, plan, loose=bool(flags))
                available = event if event > created else created
                found.append((event - _OFFSET, available - _OFFSET, plan.complete and not flags, values))
        except (InvalidTag, ValueError, struct.error) as error:
            raise ArtifactTampered(
                f"The online row at address {address.hex()} was altered or belongs elsewhere. Materialise its view "
                "again."
            ) from error
        return found

    def block(
        self, addresses: Sequence[bytes], rows: Sequence[bytes | None], plans: Sequence[Plan]
    ) -> Block | None:
        """Unpack rows by column, which is faster than `unpack`; None if `unpack` has to read them.

        That is the case if there are few rows, or if rows are missing, deleted, altered, loose (`Layout.is_loose`), in
        several layouts, or without a fixed width.
        """
        if len(rows) < BLOCK_ROWS:
            return None
        try:
            joined, size = b"".join(rows), len(rows[0])  # type: ignore[arg-type]
            table = np.frombuffer(joined, np.uint8).reshape(len(rows), size)
            _, _, _, flags, layout = _HEADER.unpack_from(joined)
            kind = joined[RANK_BYTES : _HEADER.size]
            if flags or table[:, RANK_BYTES : _HEADER.size].tobytes() != kind * len(rows):
                return None
            decrypt, class_aad, fixed, lists = self._single(plans[layout])
            if fixed is None:
                return None
            parts = zip(addresses, _split(size).iter_unpack(joined), strict=True)
            contents = [
                decrypt(nonce, sealed, class_aad + address + header)
                for address, (header, nonce, sealed) in parts
            ]
        except (InvalidTag, TypeError, ValueError, struct.error):  # TypeError: None for a missing row
            return None
        columns = columns_of(b"".join(contents), fixed)
        for position, element in lists:
            packed = np.frombuffer(b"".join(columns[position]), element)
            columns[position] = list(packed.reshape(len(rows), -1))
        return Block(_moments(table), columns)

    def _single(self, plan: Plan) -> tuple[Any, bytes, struct.Struct | None, Lists]:
        """Return the decryption, AAD, struct and lists of rows with one encrypted part in the wanted order.

        For any other plan the struct is None.
        """
        if plan.order is not None:
            return None, b"", None, ()
        part = plan.parts[0]
        if part.sensitivity == "public" or part.fixed is None:
            return None, b"", None, ()
        cipher, class_aad = self._ciphers[part.sensitivity]
        return cipher.decrypt_raw, class_aad, part.fixed, part.lists

    def _values(self, address: bytes, packed: bytes, plan: Plan, *, loose: bool) -> Sequence[Any]:
        body, row_aad = packed[_HEADER.size :], address + packed[: _HEADER.size]
        stored = (body,) if plan.single else msgpack.unpackb(body)
        groups: dict[int, Sequence[Any]] = {}
        for number, sensitivity, fixed, lists in plan.parts:
            content = stored[number]
            if sensitivity != "public":
                cipher, class_aad = self._ciphers[sensitivity]
                content = cipher.decrypt(content, class_aad + row_aad)
            values = msgpack.unpackb(content) if loose or fixed is None else fixed.unpack(content)
            groups[number] = with_lists(values, lists) if lists else values
        if plan.order is None:
            return groups[0]
        return [None if source is None else groups[source[0]][source[1]] for source in plan.order]

    def _encrypted(self, name: str, group: bytes, row_aad: bytes) -> bytes:
        if name == Sensitivity.PUBLIC:
            return group
        cipher, class_aad = self._ciphers[name]
        return cipher.encrypt(group, class_aad + row_aad)


class StagedRows:
    """Packs rows one by one, and counts those that are not deleted."""

    def __init__(self) -> None:
        self.entities = 0

    def packed(
        self, rows: Iterable[OnlineRow], cipher: RowCipher, layout: Layout
    ) -> Iterator[tuple[bytes, bytes]]:
        for row in rows:
            address = cipher.address(row.keys)
            self.entities += not row.deleted
            yield address, cipher.pack(address, row, layout, 0)


def open_hash_key(store: KeyStore, view: str, wrapped: Mapping[str, str]) -> bytes:
    """Unwrap the hash key of a view's addresses. It raises the key store's errors."""
    return store.unwrap(online_key(view, Sensitivity.INTERNAL), wrapped[ENTITY])


def _moments(table: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return event time and created time of rows of bytes."""
    offset_times = table[:, :16].copy().view(">u8").astype(np.uint64)
    return (offset_times ^ np.uint64(_OFFSET)).view(np.int64)


@functools.cache
def _split(size: int) -> struct.Struct:
    """Return the format of a row of this size with one encrypted part: header, nonce, and ciphertext with tag."""
    return struct.Struct(f"{_HEADER.size}s{NONCE_BYTES}s{size - _HEADER.size - NONCE_BYTES}s")
