"""The online store: one packed value per entity and view, read in this process.

LMDB maps the store into memory, so a read is a look-up and an unpack, and readers see either all of a materialisation
or nothing of it. Times travel with the values: time-to-live is applied at the reader's own `as_of`, and a value from
after it is never given.
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from cluster.errors import InvalidRequest
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout, local
from feature_jobs.store.catalog import ServiceSpec, ViewSpec

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_META = b"\x00meta\x00"
_MAX_KEY_BYTES = 511


class Status(enum.StrEnum):
    """What is known of a value."""

    present = "present"
    null = "null"
    """The source said null."""
    missing = "missing"
    """Nothing is known of the entity at that time."""
    expired = "expired"


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRow:
    """What a view says of one entity."""

    keys: tuple[int | str, ...]
    event_us: int
    available_us: int
    values: Sequence[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureVectors:
    """The features of some entities."""

    columns: dict[str, list[Any]]
    """`<view>__<feature>` to one value per entity."""
    status: dict[str, list[str]]


class OnlineStore:
    """Feature values by view and entity, in one LMDB environment."""

    def __init__(self, folder: Path, *, map_size_bytes: int, readonly: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if readonly and not (folder / "data.mdb").exists():
            lmdb.open(str(folder), map_size=map_size_bytes).close()
        self._orders: dict[tuple[str, str], tuple[bytes | None, list[int | None] | None]] = {}
        self._env = lmdb.open(
            str(folder), map_size=map_size_bytes, readonly=readonly, max_readers=1024, readahead=False
        )

    def replace(self, view: ViewSpec, key_types: Mapping[str, str], rows: Iterable[OnlineRow]) -> int:
        """Put a view's rows in place of all it had, in one transaction; gives how many."""
        prefix = _prefix(view.name)
        count = 0
        with self._env.begin(write=True) as transaction:
            cursor = transaction.cursor()
            while cursor.set_range(prefix) and cursor.key().startswith(prefix):
                cursor.delete()
            for row in rows:
                packed = msgpack.packb([row.event_us, row.available_us, *row.values])
                transaction.put(_packed_key(prefix, row.keys), packed)
                count += 1
            meta = {
                "version": view.version,
                "key_types": dict(key_types),
                "fields": [[field.name, field.dtype] for field in view.fields],
            }
            transaction.put(_META + view.name.encode(), msgpack.packb(meta))
        return count

    def key_types(self, view: str) -> dict[str, str]:
        """How a view's keys are stored; empty before its first materialisation."""
        with self._env.begin() as transaction:
            packed = transaction.get(_META + view.encode())
        return {} if packed is None else dict(msgpack.unpackb(packed)["key_types"])

    def get(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]) -> list[list[Any] | None]:
        """The rows of entities: event and availability in microseconds, then the view's values; none where unknown.

        The values stand in the order of this version of the view, whichever version was materialised; a feature that
        was not, or with another dtype, is null.
        """
        prefix = _prefix(view.name)
        with self._env.begin(buffers=False) as transaction:
            meta = transaction.get(_META + view.name.encode())
            found = [None if key is None else transaction.get(_packed_key(prefix, key)) for key in keys]
        order = self._order(view, meta)
        rows = [None if packed is None else msgpack.unpackb(packed) for packed in found]
        if order is None:
            return rows
        return [
            None if row is None else [*row[:2], *(None if at is None else row[at] for at in order)]
            for row in rows
        ]

    def _order(self, view: ViewSpec, meta: bytes | None) -> list[int | None] | None:
        """Where each feature of a view's version stands in the packed rows; none where they are in its own order."""
        known = self._orders.get((view.name, view.version))
        if known is None or known[0] != meta:
            stored = [] if meta is None else [tuple(field) for field in msgpack.unpackb(meta)["fields"]]
            wanted = [(field.name, field.dtype) for field in view.fields]
            places = {field: place for place, field in enumerate(stored, start=2)}
            order = None if stored == wanted else [places.get(field) for field in wanted]
            known = self._orders[view.name, view.version] = (meta, order)
        return known[1]

    def close(self) -> None:
        """Unmap the store."""
        self._env.close()


class FeatureReader:
    """Reads a service's features by entity key."""

    def __init__(self, spec: ServiceSpec, store: OnlineStore) -> None:
        self._spec = spec
        self._store = store
        self._key_types: dict[str, dict[str, str]] = {}

    def read(self, entities: Sequence[Mapping[str, Any]], as_of: dt.datetime) -> FeatureVectors:
        """The features of entities as they stand at a moment.

        Raises:
            InvalidRequest: an entity lacks a key, or has one of the wrong type.
        """
        at_us = microseconds(as_of)
        vectors = FeatureVectors(columns={}, status={})
        for view in self._spec.views:
            keys = [self._key(view, entity, vectors, i) for i, entity in enumerate(entities)]
            rows = self._store.get(view, keys)
            states = [_state(row, at_us, view.ttl_s) for row in rows]
            for position, name in enumerate(view.columns, start=2):
                values = [
                    row[position]
                    if row is not None and state is Status.present and position < len(row)
                    else None
                    for row, state in zip(rows, states, strict=True)
                ]
                vectors.columns[name] = values
                vectors.status[name] = [
                    Status.null if state is Status.present and value is None else state
                    for state, value in zip(states, values, strict=True)
                ]
        return vectors

    def _key(
        self, view: ViewSpec, entity: Mapping[str, Any], vectors: FeatureVectors, position: int
    ) -> tuple[int | str, ...] | None:
        """An entity's key in a view; none where an earlier view that should give it knows nothing."""
        types = self._types(view)
        parts: list[int | str] = []
        for key in view.join_keys:
            value = entity[key] if key in entity else self._from_earlier(view, key, vectors, position)
            if value is None:
                return None
            wanted = types.get(key)
            if wanted is not None and isinstance(value, str) != (wanted == "string"):
                kind = "text" if wanted == "string" else "a whole number"
                raise InvalidRequest(f"entities[{position}].{key} must be {kind}, got {value!r}.")
            parts.append(value)
        return tuple(parts)

    def _from_earlier(self, view: ViewSpec, key: str, vectors: FeatureVectors, position: int) -> Any:
        views = self._spec.views
        for earlier in reversed(views[: views.index(view)]):
            column = vectors.columns.get(f"{earlier.name}__{key}")
            if column is not None:
                return column[position]
        raise InvalidRequest(f"entities[{position}] lacks the key '{key}' of view '{view.name}'.")

    def _types(self, view: ViewSpec) -> dict[str, str]:
        if not self._key_types.get(view.name):
            self._key_types[view.name] = self._store.key_types(view.name)
        return self._key_types[view.name]


def open_online(config: OnlineConfig, places: Layout, *, readonly: bool = True) -> OnlineStore:
    """The configured online store."""
    match config.kind:
        case OnlineKind.lmdb:
            size = int(config.map_size_gib * 2**30)
            return OnlineStore(local(places.online), map_size_bytes=size, readonly=readonly)


def microseconds(moment: dt.datetime) -> int:
    """UTC microseconds since 1970, exactly."""
    return (moment - _EPOCH) // dt.timedelta(microseconds=1)


def _prefix(view: str) -> bytes:
    return view.encode() + b"\x00"


def _packed_key(prefix: bytes, keys: tuple[int | str, ...]) -> bytes:
    """LMDB takes 511 bytes, so a longer key is cut and made unique by its hash."""
    packed: bytes = prefix + msgpack.packb(keys)
    if len(packed) <= _MAX_KEY_BYTES:
        return packed
    return packed[: _MAX_KEY_BYTES - 32] + hashlib.sha256(packed).digest()


def _state(row: list[Any] | None, at_us: int, ttl_s: float | None) -> Status:
    if row is None or row[1] > at_us:
        return Status.missing
    if ttl_s is not None and at_us - row[0] > ttl_s * 1_000_000:
        return Status.expired
    return Status.present
