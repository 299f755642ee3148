"""The online store: one packed row per entity and view, read in this process, protected values sealed by class.

LMDB maps the store into memory, so a read is a look-up and an unpack, and readers see either all of a materialisation
or nothing of it. Times travel with the values: time-to-live is applied at the reader's own `as_of`, and a value from
after it is never given.
"""

from __future__ import annotations

import datetime as dt
import enum
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from cluster.errors import InvalidRequest
from cluster.security.keys.store import KeyStore, KeyStoreUnavailable
from cluster.security.parquet import CACHE_S
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout, local
from feature_jobs.store.catalog import ServiceSpec, ViewSpec
from feature_jobs.store.online_rows import RowCipher

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_META = b"\x00meta\x00"
RETRY_S = 1.0
"""After this the key store is asked again, where it could not be; values are read with the keys of before."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A view's materialisation, as one version of the view reads it."""

    meta: bytes
    order: list[tuple[str, int] | None]
    """Class and place therein of each feature; none for one that was not materialised, or with another dtype."""
    classes: tuple[str, ...]
    cipher: RowCipher
    until: float
    """When the keys have to be asked for again, by the monotonic clock."""


class OnlineStore:
    """Feature values by view and entity, in one LMDB environment."""

    def __init__(self, folder: Path, keys: KeyStore, *, map_size_bytes: int, readonly: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if readonly and not (folder / "data.mdb").exists():
            lmdb.open(str(folder), map_size=map_size_bytes).close()
        self._keys = keys
        self._known: dict[tuple[str, str], _Opened] = {}
        self._env = lmdb.open(
            str(folder), map_size=map_size_bytes, readonly=readonly, max_readers=1024, readahead=False
        )

    def replace(self, view: ViewSpec, key_types: Mapping[str, str], rows: Iterable[OnlineRow]) -> int:
        """Put a view's rows in place of all it had, in one transaction; gives how many.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says; the old rows stay.
        """
        prefix = _prefix(view.name)
        names: dict[str, list[int]] = {}
        for place, field in enumerate(view.fields):
            names.setdefault(field.sensitivity, []).append(place)
        cipher, wrapped = RowCipher.create(self._keys, view.name, names)
        count = 0
        with self._env.begin(write=True) as transaction:
            cursor = transaction.cursor()
            while cursor.set_range(prefix) and cursor.key().startswith(prefix):
                cursor.delete()
            for row in rows:
                address = cipher.address(row.keys)
                groups = {name: [row.values[place] for place in places] for name, places in names.items()}
                packed = cipher.pack(address, row.event_us, row.available_us, groups)
                transaction.put(prefix + address, packed)
                count += 1
            meta = {
                "version": view.version,
                "key_types": dict(key_types),
                "fields": [[field.name, field.dtype, field.sensitivity] for field in view.fields],
                "data_keys": wrapped,
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

        Raises:
            AccessDenied, KeyRevoked: the keys of a class that the view has are not given to this process.
            ArtifactTampered: a value is not the one that was written there.
        """
        prefix = _prefix(view.name)
        with self._env.begin(buffers=False) as transaction:
            meta = transaction.get(_META + view.name.encode())
            if meta is None:
                return [None for _ in keys]
            opened = self._opened(view, meta)
            addresses = [None if key is None else opened.cipher.address(key) for key in keys]
            found = [None if address is None else transaction.get(prefix + address) for address in addresses]
        return [
            None if address is None or packed is None else _row(opened, address, packed)
            for address, packed in zip(addresses, found, strict=True)
        ]

    def _opened(self, view: ViewSpec, meta: bytes) -> _Opened:
        """The materialisation's data keys and order, asked for once in a while."""
        known = self._known.get((view.name, view.version))
        now = time.monotonic()
        if known is not None and known.meta == meta and now < known.until:
            return known
        try:
            opened = self._open(view, meta, until=now + CACHE_S)
        except KeyStoreUnavailable:
            if known is None or known.meta != meta:
                raise
            opened = replace(known, until=now + RETRY_S)
        self._known[view.name, view.version] = opened
        return opened

    def _open(self, view: ViewSpec, meta: bytes, *, until: float) -> _Opened:
        stored = msgpack.unpackb(meta)
        places: dict[tuple[str, str], tuple[str, int]] = {}
        sizes: dict[str, int] = {}
        for name, dtype, sensitivity in stored["fields"]:
            places[name, dtype] = sensitivity, sizes.get(sensitivity, 0)
            sizes[sensitivity] = sizes.get(sensitivity, 0) + 1
        order = [places.get((field.name, field.dtype)) for field in view.fields]
        classes = tuple(sorted({place[0] for place in order if place is not None}))
        cipher = RowCipher.open(self._keys, view.name, stored["data_keys"], classes)
        return _Opened(meta=meta, order=order, classes=classes, cipher=cipher, until=until)

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


def open_online(
    config: OnlineConfig, places: Layout, keys: KeyStore, *, readonly: bool = True
) -> OnlineStore:
    """The configured online store, with the keys that this process may use."""
    match config.kind:
        case OnlineKind.lmdb:
            size = int(config.map_size_gib * 2**30)
            return OnlineStore(local(places.online), keys, map_size_bytes=size, readonly=readonly)


def microseconds(moment: dt.datetime) -> int:
    """UTC microseconds since 1970, exactly."""
    return (moment - _EPOCH) // dt.timedelta(microseconds=1)


def _prefix(view: str) -> bytes:
    return view.encode() + b"\x00"


def _row(opened: _Opened, address: bytes, packed: bytes) -> list[Any]:
    event_us, available_us, groups = opened.cipher.unpack(address, packed, opened.classes)
    return [
        event_us,
        available_us,
        *(None if place is None else groups[place[0]][place[1]] for place in opened.order),
    ]


def _state(row: list[Any] | None, at_us: int, ttl_s: float | None) -> Status:
    if row is None or row[1] > at_us:
        return Status.missing
    if ttl_s is not None and at_us - row[0] > ttl_s * 1_000_000:
        return Status.expired
    return Status.present
