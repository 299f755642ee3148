"""Read the features of a service from the online store, as of a given time.

Each value is read with its times. The TTL is applied at the reader's `as_of`, and a value that became known after
`as_of` is never returned. In the common case, with all rows present and no null, a read is a few operations over whole
columns. Other cases are slower.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest
from cluster.security.keys.store import KeyStore
from cluster.settings import OnlineConfig, OnlineKind
from cluster.storage import Layout, local, resolve
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.online.lmdb_engine import LmdbEngine
from feature_jobs.store.online.rows import Block, FoundRow
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.online.window_states import WindowedView
from feature_jobs.store.types.key_types import describe_key_type, key_type_of
from feature_jobs.store.types.status import FeatureVectors, Status

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_TYPES: dict[str, type] = {"int64": int, "string": str}

Key = tuple[int | str, ...] | None

_PRESENT, _NULL, _MISSING, _EXPIRED, _NEWER = Status  # a name is faster than an attribute of the enum


class FeatureReader:
    """Reads a service's features by entity key."""

    def __init__(self, spec: ServiceSpec, store: OnlineStore) -> None:
        self.spec = spec
        self._store = store
        self.dtypes = spec.dtypes
        self._columns = [view.columns for view in spec.views]
        self._windowed = {
            view.name: WindowedView(view, view.windows) for view in spec.views if view.windows is not None
        }
        self._key_types: dict[str, Mapping[str, str]] = {}
        self._materialised: set[str] = set()

    def read(self, entities: Sequence[Mapping[str, Any]], as_of: dt.datetime) -> FeatureVectors:
        """Return the features of entities as of a given time.

        Args:
            entities: join keys of each entity.
            as_of: the time at which TTL and status are evaluated.

        Raises:
            InvalidRequest: an entity lacks a join key, or has one of the wrong type.
        """
        at_us = epoch_microseconds(as_of)
        columns: dict[str, list[Any]] = {}
        status: dict[str, Sequence[str]] = {}
        for view, names in zip(self.spec.views, self._columns, strict=True):
            rows = self._rows(view, self._keys(view, entities, columns), at_us)
            oldest_us = -(2**63) if view.ttl_s is None else at_us - round(view.ttl_s * 1_000_000)
            if isinstance(rows, Block):
                complete, values = True, rows.columns
                row_status = _block_status(rows, oldest_us, at_us)
            else:
                row_status, values, complete = _row_status(rows, len(names), oldest_us, at_us)
            # This loop takes half the time of `columns.update(zip(…))`.
            for name, column in zip(names, values, strict=True):
                columns[name] = column
            if complete:
                status.update(dict.fromkeys(names, row_status))
            else:
                column_status = (_with_nulls(row_status, column) for column in values)
                status.update(zip(names, column_status, strict=True))
        return FeatureVectors(columns=columns, status=status)

    def _rows(self, view: ViewSpec, keys: Sequence[Key], at_us: int) -> Block | Sequence[FoundRow | None]:
        windowed = self._windowed.get(view.name)
        if windowed is None:
            return self._store.read(view, keys)
        if not self._is_materialised(view.name):
            return [None for _ in keys]
        return windowed.rows_at(keys, self._store.get(windowed.stored, keys), at_us)

    def _is_materialised(self, view: str) -> bool:
        if view not in self._materialised and self._store.is_materialised(view):
            self._materialised.add(view)
        return view in self._materialised

    def _keys(
        self, view: ViewSpec, entities: Sequence[Mapping[str, Any]], earlier: Mapping[str, Sequence[Any]]
    ) -> Sequence[Key]:
        """Return each entity's key in a view. None if the key is a feature of an earlier view and has no value."""
        types = self._types(view)
        if len(view.join_keys) == 1:
            key = view.join_keys[0]
            column = [entity.get(key) for entity in entities]
            if set(map(type, column)) == {_TYPES.get(types.get(key, ""))}:
                return [(value,) for value in column]  # type: ignore[misc]  # all of the key's type
        return [self._key(view, types, entity, earlier, position) for position, entity in enumerate(entities)]

    def _key(
        self,
        view: ViewSpec,
        types: Mapping[str, str],
        entity: Mapping[str, Any],
        earlier: Mapping[str, Sequence[Any]],
        position: int,
    ) -> Key:
        parts: list[int | str] = []
        for key in view.join_keys:
            value = entity[key] if key in entity else self._from_earlier(view, key, earlier, position)
            if value is None:
                return None
            key_type, value_type = types.get(key), key_type_of(value)
            if key_type not in (None, value_type):
                types = self._types(view, refresh=True)
                key_type = types.get(key)
            if value_type is None or key_type not in (None, value_type):
                raise InvalidRequest(
                    f"entities[{position}].{key} must be {describe_key_type(key_type)}, got {value!r}."
                )
            parts.append(value)
        return tuple(parts)

    def _from_earlier(
        self, view: ViewSpec, key: str, earlier: Mapping[str, Sequence[Any]], position: int
    ) -> Any:
        views = self.spec.views
        for other in reversed(views[: views.index(view)]):
            column = earlier.get(f"{other.name}__{key}")
            if column is not None:
                return _key_value(column[position])
        raise InvalidRequest(f"entities[{position}] lacks the key '{key}' of view '{view.name}'.")

    def _types(self, view: ViewSpec, *, refresh: bool = False) -> Mapping[str, str]:
        """Return the types of a view's keys: the declared ones, else the stored ones.

        Args:
            view: the view.
            refresh: whether to read the stored types again. They change once if pushes came before the table's first
                batch.
        """
        types = self._key_types.get(view.name)
        if not types or refresh:
            stored = self._store.key_types(view.name)
            types = self._key_types[view.name] = {**stored, **view.key_types}
        return types


def _key_value(value: Any) -> Any:
    """Return a feature as a key: a whole number that is stored as a float becomes an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def open_online_store(
    config: OnlineConfig,
    places: Layout,
    keys: KeyStore,
    *,
    readonly: bool = True,
    fails_fast: bool = False,
) -> OnlineStore:
    """Open the configured online store.

    Args:
        config: settings of the online store.
        places: folders of the installation.
        keys: the keys that this process may use.
        readonly: whether LMDB is opened for reading only.
        fails_fast: whether an outage of Redis soon raises an error, for a caller that retries its calls itself.

    Raises:
        ConfigError: LMDB is configured, but the storage root is remote.
    """
    match config.kind:
        case OnlineKind.lmdb:
            size = int(config.map_size_gib * 2**30)
            engine = LmdbEngine(local(places.online), map_size_bytes=size, readonly=readonly)
            return OnlineStore(engine, keys)
        case OnlineKind.redis:
            from feature_jobs.store.online.redis_engine import RedisEngine  # LMDB needs no Redis client

            files = [
                None if name is None else Path(resolve(name))
                for name in (config.ca_file, config.password_file)
            ]
            remote = RedisEngine(
                config.url,
                prefix=config.prefix,
                ca_file=files[0],
                password_file=files[1],
                fails_fast=fails_fast,
            )
            return OnlineStore(remote, keys)


def epoch_microseconds(moment: dt.datetime) -> int:
    """Return the exact number of microseconds since 1970-01-01 UTC."""
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _block_status(block: Block, oldest_us: int, at_us: int) -> list[Status]:
    """Return each row's status at a given time. If the status is not `present`, set the row's values to null."""
    if block.within(oldest_us, at_us):
        return [_PRESENT] * len(block.moments)
    status = [
        _NEWER if available > at_us else _EXPIRED if event < oldest_us else _PRESENT
        for event, available in block.times()
    ]
    absent = [position for position, state in enumerate(status) if state is not _PRESENT]
    for column in block.columns:
        for position in absent:
            column[position] = None
    return status


def _row_status(
    found: Sequence[FoundRow | None], width: int, oldest_us: int, at_us: int
) -> tuple[list[Status], list[list[Any]], bool]:
    """Return each row's status at a given time, the values by column, and whether the present rows have no null."""
    status: list[Status] = []
    rows: list[Sequence[Any]] = []
    complete, nulls = True, (None,) * width
    for row in found:
        values: Sequence[Any] = nulls
        if row is None:
            state = _MISSING
        else:
            event_us, available_us, row_complete, row_values = row
            if available_us > at_us:
                state = _NEWER
            elif not row_values:
                state = _MISSING
            elif event_us < oldest_us:
                state = _EXPIRED
            else:
                state, values = _PRESENT, row_values
                complete = complete and row_complete
        status.append(state)
        rows.append(values)
    if len(rows) == 1:
        return status, [[value] for value in rows[0]], complete
    return status, [list(column) for column in zip(*rows, strict=True)], complete


def _with_nulls(status: list[Status], values: Sequence[Any]) -> list[Status]:
    return [
        _NULL if state is _PRESENT and value is None else state
        for state, value in zip(status, values, strict=True)
    ]
