"""Reading features online: by a service's definition, at the reader's own time.

Times travel with the values: time-to-live is applied at the reader's own `as_of`, and a value from after it is never
given. The common case, everything there and nothing null, is a few operations over whole columns; the others pay for
what they need.
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
from feature_jobs.store.online.rows import Block, Found
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.online.windows import WindowedView
from feature_jobs.store.types.key_types import kind_of, type_of
from feature_jobs.store.types.status import FeatureVectors, Status

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_TYPES: dict[str, type] = {"int64": int, "string": str}

Key = tuple[int | str, ...] | None


_PRESENT, _NULL, _MISSING, _EXPIRED, _NEWER = Status  # an enum's members are slow to look up


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
        self._whole: set[str] = set()

    def read(self, entities: Sequence[Mapping[str, Any]], as_of: dt.datetime) -> FeatureVectors:
        """The features of entities as they stand at a moment.

        Raises:
            InvalidRequest: an entity lacks a key, or has one of the wrong type.
        """
        at_us = microseconds(as_of)
        columns: dict[str, list[Any]] = {}
        status: dict[str, Sequence[str]] = {}
        for view, names in zip(self.spec.views, self._columns, strict=True):
            found = self._found(view, self._keys(view, entities, columns), at_us)
            oldest_us = -(2**63) if view.ttl_s is None else at_us - round(view.ttl_s * 1_000_000)
            if isinstance(found, Block):
                whole, values = True, found.columns
                states = _judge_block(found, oldest_us, at_us)
            else:
                states, values, whole = _judge_rows(found, len(names), oldest_us, at_us)
            for name, column in zip(names, values, strict=True):  # half the time of an update with pairs
                columns[name] = column
            if whole:
                status.update(dict.fromkeys(names, states))
            else:
                judged = (_with_nulls(states, column) for column in values)
                status.update(zip(names, judged, strict=True))
        return FeatureVectors(columns=columns, status=status)

    def _found(self, view: ViewSpec, keys: Sequence[Key], at_us: int) -> Block | Sequence[Found | None]:
        windowed = self._windowed.get(view.name)
        if windowed is None:
            return self._store.read(view, keys)
        if not self._is_whole(view.name):
            return [None for _ in keys]
        return windowed.found(keys, self._store.get(windowed.stored, keys), at_us)

    def _is_whole(self, view: str) -> bool:
        if view not in self._whole and self._store.is_whole(view):
            self._whole.add(view)
        return view in self._whole

    def _keys(
        self, view: ViewSpec, entities: Sequence[Mapping[str, Any]], earlier: Mapping[str, Sequence[Any]]
    ) -> Sequence[Key]:
        """Each entity's key in a view; none where an earlier view that should give it knows nothing."""
        types = self._types(view)
        if len(view.join_keys) == 1:
            key = view.join_keys[0]
            column = [entity.get(key) for entity in entities]
            if set(map(type, column)) == {_TYPES.get(types.get(key, ""))}:
                return [(value,) for value in column]  # type: ignore[misc]  # of the one type that is asked for
        return [self._key(view, types, entity, earlier, place) for place, entity in enumerate(entities)]

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
            wanted, given = types.get(key), type_of(value)
            if wanted not in (None, given):
                types = self._types(view, again=True)
                wanted = types.get(key)
            if given is None or wanted not in (None, given):
                raise InvalidRequest(f"entities[{position}].{key} must be {kind_of(wanted)}, got {value!r}.")
            parts.append(value)
        return tuple(parts)

    def _from_earlier(
        self, view: ViewSpec, key: str, earlier: Mapping[str, Sequence[Any]], position: int
    ) -> Any:
        views = self.spec.views
        for other in reversed(views[: views.index(view)]):
            column = earlier.get(f"{other.name}__{key}")
            if column is not None:
                return _whole(column[position])
        raise InvalidRequest(f"entities[{position}] lacks the key '{key}' of view '{view.name}'.")

    def _types(self, view: ViewSpec, *, again: bool = False) -> Mapping[str, str]:
        """Of the view's keys: as they are declared, else as they are stored online.

        Args:
            view: whose.
            again: look whether they changed, which they do once if pushes came before the first batch of the table.
        """
        types = self._key_types.get(view.name)
        if not types or again:
            stored = self._store.key_types(view.name)
            types = self._key_types[view.name] = {**stored, **view.key_types}
        return types


def _whole(value: Any) -> Any:
    """A feature that serves as a key: a whole number that is stored as a fraction counts as what it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def open_online(
    config: OnlineConfig, places: Layout, keys: KeyStore, *, readonly: bool = True
) -> OnlineStore:
    """The configured online store, with the keys that this process may use.

    Raises:
        ConfigError: LMDB below a remote storage root.
    """
    match config.kind:
        case OnlineKind.lmdb:
            size = int(config.map_size_gib * 2**30)
            engine = LmdbEngine(local(places.online), map_size_bytes=size, readonly=readonly)
            return OnlineStore(engine, keys)
        case OnlineKind.redis:
            from feature_jobs.store.online.redis_engine import RedisEngine  # only where it is used

            files = [
                None if name is None else Path(resolve(name))
                for name in (config.ca_file, config.password_file)
            ]
            remote = RedisEngine(config.url, prefix=config.prefix, ca_file=files[0], password_file=files[1])
            return OnlineStore(remote, keys)


def microseconds(moment: dt.datetime) -> int:
    """UTC microseconds since 1970, exactly."""
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _judge_block(block: Block, oldest_us: int, at_us: int) -> list[Status]:
    """Each row's status at a moment; of those that are not present then, the values are taken out."""
    if block.within(oldest_us, at_us):
        return [_PRESENT] * len(block.moments)
    states = [
        _NEWER if known > at_us else _EXPIRED if event < oldest_us else _PRESENT
        for event, known in block.times()
    ]
    absent = [place for place, state in enumerate(states) if state is not _PRESENT]
    for column in block.columns:
        for place in absent:
            column[place] = None
    return states


def _judge_rows(
    found: Sequence[Found | None], width: int, oldest_us: int, at_us: int
) -> tuple[list[Status], list[list[Any]], bool]:
    """Each row's status at a moment, the values by column, and whether none of those that are present is null."""
    states: list[Status] = []
    rows: list[Sequence[Any]] = []
    whole, nothing = True, (None,) * width
    for row in found:
        if row is None or row[1] > at_us or not row[3]:
            states.append(_NEWER if row is not None and row[1] > at_us else _MISSING)
            rows.append(nothing)
        elif row[0] < oldest_us:
            states.append(_EXPIRED)
            rows.append(nothing)
        else:
            states.append(_PRESENT)
            rows.append(row[3])
            whole = whole and row[2]
    if len(rows) == 1:
        return states, [[value] for value in rows[0]], whole
    return states, [list(column) for column in zip(*rows, strict=True)], whole


def _with_nulls(states: list[Status], values: Sequence[Any]) -> list[Status]:
    return [
        _NULL if state is _PRESENT and value is None else state
        for state, value in zip(states, values, strict=True)
    ]
