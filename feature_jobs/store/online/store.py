"""Feature values: one packed row per view and entity. A row is only replaced by a row with a greater rank.

The rank is (event, created, seq). So rows may come in any order, more than once, and from a materialisation and from
pushes at the same time: the result is the same. A deleted entity keeps a row without values, so an older row that comes
late cannot restore the values.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.errors import FalajError, OnlineStoreOutdated, SourceError
from cluster.security.encryption.envelope import ValueCipher
from cluster.security.encryption.parquet import CACHE_S
from cluster.security.keys.store import KeyRevoked, KeyStore, KeyStoreUnavailable
from feature_jobs.store.catalog.protection import online_key
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.views import Sensitivity
from feature_jobs.store.online.changes import Change, Merge
from feature_jobs.store.online.engine import NOTHING, Carry, Engine, RecentRow, Rows, Write
from feature_jobs.store.online.layout import Plan
from feature_jobs.store.online.meta import FORMAT, Meta, layout_of
from feature_jobs.store.online.rows import (
    EVERYTHING,
    Block,
    FoundRow,
    Horizon,
    OnlineRow,
    RowCipher,
    StagedRows,
    header_of,
    online_row,
    open_hash_key,
    rank_of,
)

RETRY_S = 1.0
"""Seconds until the next call of a key store that was unavailable. Until then the cached keys are used."""
KEPT_S = 3600.0
"""Seconds for which keys are used that were unwrapped before the key store became unavailable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Generation:
    """A view's current generation, as one version of the view reads it."""

    meta: Meta
    stamp: bytes
    plans: tuple[Plan, ...]
    """By layout."""
    cipher: RowCipher
    expires_at: float
    """Monotonic time at which the keys have to be unwrapped again."""
    opened_at: float
    """Monotonic time at which the keys were unwrapped."""


_Stored: TypeAlias = tuple[_Generation, Sequence[bytes], Sequence[bytes | None]]
"""A view's generation, the addresses of some entities, and their rows as they are stored. A plain tuple, because a
NamedTuple is slower to make."""


class OnlineStore:
    """Feature values in one engine, with the keys that this process may use."""

    def __init__(self, engine: Engine, keys: KeyStore) -> None:
        self.engine = engine
        self._keys = keys
        self._cache: dict[tuple[str, str], _Generation] = {}

    def get(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]) -> list[FoundRow | None]:
        """Return the rows of entities in order; None for an entity that is unknown or was deleted.

        The values are in the field order of this version of the view, whatever version wrote the row. A feature is null
        if it was not written, or was written with another dtype.

        Raises:
            AccessDenied, KeyRevoked: the key store refuses the key of a class of the view.
            ArtifactTampered: a value was altered or moved.
            OnlineStoreOutdated: another release wrote the rows. `put` and `update` raise it too.
            OnlineStoreUnavailable: the engine cannot be reached.
        """
        return [row if row and row[3] else None for row in self._rows(view, keys)]  # row[3]: values

    def _rows(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]) -> list[FoundRow | None]:
        known = [key for key in keys if key is not None]
        stored = self._stored(view, known)
        if stored is None:
            return [None for _ in keys]
        generation, addresses, packed = stored
        rows = generation.cipher.unpack(addresses, packed, generation.plans)
        if len(known) == len(keys):
            return rows
        remaining = iter(rows)
        return [None if key is None else next(remaining) for key in keys]

    def read(
        self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]
    ) -> Block | list[FoundRow | None]:
        """Return the rows of entities: as a `Block` if all of them exist and have no null, else as a list.

        Unlike `get`, the list has rows without values for deleted entities. For errors see `get`.
        """
        known = [key for key in keys if key is not None]
        if len(known) < len(keys) or (stored := self._stored(view, known)) is None:
            return self._rows(view, keys)
        generation, addresses, packed = stored
        block = generation.cipher.block(addresses, packed, generation.plans)
        return generation.cipher.unpack(addresses, packed, generation.plans) if block is None else block

    def _stored(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...]]) -> _Stored | None:
        """Return the stored rows of entities; None before the view's first row."""
        while (generation := self._generation(view)) is not None:
            addresses = generation.cipher.addresses(keys)
            rows = self.engine.rows(view.name, generation.stamp, addresses)
            if rows is not None:
                return generation, addresses, rows
            self._forget(view)  # the view has another meta by now
        return None

    def hold_keys(self, view: ViewSpec) -> None:
        """Unwrap the keys of a view's rows now, if it has rows. For errors see `get`."""
        self._generation(view)

    def put(self, view: ViewSpec, key_types: Mapping[str, str], rows: Sequence[OnlineRow]) -> int:
        """Write rows with a greater rank than the stored rows, in one transaction; return the number written.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: the key store refuses a key.
            OnlineStoreUnavailable: the engine cannot be reached, or is full.
        """
        return self._write(view, key_types, [(row, b"") for row in rows])

    def assign_sequence(
        self, view: ViewSpec, key_types: Mapping[str, str], rows: Sequence[tuple[OnlineRow, int]]
    ) -> int:
        """Replace the provisional numbers of pushed rows by their `ingest_seq`, and return the number written.

        A row is only changed if it is still the newest of its entity. For errors see `put`.
        """
        return self._write(view, key_types, [(replace(row, seq=seq), rank_of(row)) for row, seq in rows])

    def replace(
        self,
        view: ViewSpec,
        key_types: Mapping[str, str],
        rows: Iterable[OnlineRow],
        *,
        horizon: Horizon = EVERYTHING,
        merge: Merge | None = None,
    ) -> int:
        """Replace all rows of a view by a new generation, and return the number of its entities.

        Stored rows in an older format are dropped, because new addresses cannot be computed for them.

        Args:
            view: the view.
            key_types: types of the view's join keys.
            rows: one row for each entity.
            horizon: the table rows that the new rows were made from. Stored rows beyond it are copied.
            merge: merges a stored row into the new one. Needed if an online row is made from many table rows.

        Raises:
            SourceError: another materialisation of the view finished in the meantime. Nothing was changed.
            KeyNotFound, KeyRevoked, AccessDenied: the key store refuses a key. The old rows stay.
            OnlineStoreUnavailable: the engine cannot be reached, or is full. The old rows stay.
        """
        name, previous = view.name, self._meta(view.name)
        first_generation = previous.generation if previous else None
        hash_key = self._hash_key(name, previous)
        classes = layout_of(view).classes
        cipher, wrapped = RowCipher.create(self._keys, name, classes, hash_key=hash_key)
        meta = Meta.new(view, key_types, wrapped, materialised=True)
        counter = StagedRows()
        self.engine.stage(name, meta.generation, counter.packed(rows, cipher, meta.layouts[0]))
        while True:
            stamp = previous.stamp if previous else None
            carry = self._carry(view, previous if hash_key else None, cipher, meta, horizon, merge)
            if self.engine.switch(name, stamp, meta.pack(), carry):
                return counter.entities
            previous = self._meta(name)
            if (previous.generation if previous else None) != first_generation:
                raise SourceError(
                    f"View '{name}' was materialised by another job at the same time, or got its first pushed rows. "
                    "This job changed nothing. Run it again."
                )

    def update(self, view: ViewSpec, key_types: Mapping[str, str], changes: Sequence[Change]) -> None:
        """Make new rows from the stored rows. If another writer changes these, make the new rows again.

        For errors see `put`.

        Args:
            view: the view.
            key_types: types of the view's join keys.
            changes: one change for each entity.
        """
        while changes:
            generation, number = self._for_writing(view, key_types)
            addresses = generation.cipher.addresses([change.keys for change in changes])
            stored = self.engine.rows(view.name, generation.stamp, addresses)
            if stored is not None:
                writes = self._changed(generation, number, changes, stored)
                written = self.engine.put(view.name, generation.stamp, writes) if writes else 0
                if written == len(writes):
                    return
                if written is not None:
                    continue
            self._forget(view)

    def is_materialised(self, view: str) -> bool:
        """Return whether the view was materialised, so that an entity without a row has no values."""
        meta = self._meta(view)
        return meta is not None and meta.materialised

    def key_types(self, view: str) -> Mapping[str, str]:
        """Return the types of a view's stored keys; empty before its first row."""
        meta = self._meta(view)
        return {} if meta is None else meta.key_types

    def set_key_types(self, view: str, key_types: Mapping[str, str]) -> None:
        """Set the types of a view's keys to those of its feature table. They differ if pushes came before the table."""
        meta = self._meta(view)
        if meta is not None and dict(meta.key_types) != dict(key_types):
            self.engine.set_meta(view, meta.stamp, meta.with_key_types(key_types).pack())

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _write(
        self, view: ViewSpec, key_types: Mapping[str, str], rows: Sequence[tuple[OnlineRow, bytes]]
    ) -> int:
        """Write rows. Each comes with the rank that it must replace, or `b""` to replace any smaller rank."""
        if not rows:
            return 0
        while True:
            generation, number = self._for_writing(view, key_types)
            layout, cipher = generation.meta.layouts[number], generation.cipher
            addressed = [(cipher.address(row.keys), row, expected) for row, expected in rows]
            writes = [
                Write(address, cipher.pack(address, row, layout, number), expected)
                for address, row, expected in addressed
            ]
            written = self.engine.put(view.name, generation.stamp, writes)
            if written is not None:
                return written
            self._forget(view)

    def _for_writing(self, view: ViewSpec, key_types: Mapping[str, str]) -> tuple[_Generation, int]:
        """Return the view's generation and the index of its layout. Create what does not exist yet."""
        while True:
            generation = self._generation(view)
            if generation is None:
                _, wrapped = RowCipher.create(self._keys, view.name, layout_of(view).classes)
                meta = Meta.new(view, key_types, wrapped, materialised=False)
                self.engine.set_meta(view.name, None, meta.pack())
                continue
            meta = generation.meta
            if dict(meta.key_types) != dict(key_types):
                # Pushes came before the feature table existed, and the table then got other key types.
                self.engine.set_meta(view.name, generation.stamp, meta.with_key_types(key_types).pack())
                self._forget(view)
                continue
            number = meta.layout_number(view)
            if number is not None:
                return generation, number
            missing = set(layout_of(view).classes) - {*meta.data_keys, Sensitivity.PUBLIC}
            new_keys = {
                name: ValueCipher.create(self._keys, online_key(view.name, name))[1] for name in missing
            }
            self.engine.set_meta(view.name, generation.stamp, meta.with_layout(view, new_keys).pack())
            self._forget(view)

    def _carry(
        self,
        view: ViewSpec,
        previous: Meta | None,
        cipher: RowCipher,
        meta: Meta,
        horizon: Horizon,
        merge: Merge | None,
    ) -> Carry:
        """Return the function that packs the recent rows of the previous generation for the new one.

        Without `merge` these are the rows beyond the horizon. With it, they are the merged rows.
        """
        layout = meta.layouts[0]
        plan = layout.plan([(field.name, field.dtype) for field in view.fields])

        def carry(recent: Sequence[RecentRow]) -> Rows:
            if merge is None:
                recent = [row for row in recent if not horizon.covers(header_of(row.packed).seq)]
            if not recent or previous is None:
                return []
            generation = self._open(view, previous, expires_at=0.0)
            addresses = [row.address for row in recent]
            old = generation.cipher.unpack(addresses, [row.packed for row in recent], generation.plans)
            new = cipher.unpack(addresses, [row.staged if merge else None for row in recent], [plan])
            carried = []
            for (address, packed, staged), old_row, new_row in zip(recent, old, new, strict=True):
                row: OnlineRow | None
                row = previous_row = online_row(header_of(packed), old_row)
                if merge is not None:
                    staged_row = None if staged is None else online_row(header_of(staged), new_row)
                    row = merge(staged_row, previous_row, horizon)
                if row is not None:
                    carried.append((address, cipher.pack(address, row, layout, 0)))
            return carried

        return carry

    def _changed(
        self,
        generation: _Generation,
        number: int,
        changes: Sequence[Change],
        stored: Sequence[bytes | None],
    ) -> list[Write]:
        """Return the writes that apply changes to the stored rows."""
        addresses = generation.cipher.addresses([change.keys for change in changes])
        found = generation.cipher.unpack(addresses, stored, generation.plans)
        writes = []
        for change, address, packed, found_row in zip(changes, addresses, stored, found, strict=True):
            old_row = None if packed is None else online_row(header_of(packed), found_row)
            row = change.make(old_row, generation.meta.materialised)
            if row is not None:
                content = generation.cipher.pack(address, row, generation.meta.layouts[number], number)
                writes.append(Write(address, content, NOTHING if old_row is None else rank_of(old_row)))
        return writes

    def _hash_key(self, view: str, previous: Meta | None) -> bytes | None:
        """Return the hash key of the previous generation.

        None if there is no previous generation, it has another format, or its key was revoked.
        """
        if previous is None or previous.format != FORMAT:
            return None
        try:
            return open_hash_key(self._keys, view, previous.data_keys)
        except KeyRevoked:
            return None

    def _meta(self, view: str) -> Meta | None:
        packed = self.engine.meta(view)
        return None if packed is None else Meta.unpack(packed)

    def _forget(self, view: ViewSpec) -> None:
        """Drop the cached generation of a view."""
        self._cache.pop((view.name, view.version), None)

    def _generation(self, view: ViewSpec) -> _Generation | None:
        """Return the view's generation and its data keys, cached for `CACHE_S`; None before the view's first row.

        While the key store is unavailable, the cached keys are used for up to `KEPT_S`. If the key store refuses a key,
        for example a revoked one, the cached keys are not used again.
        """
        cached = self._cache.get((view.name, view.version))
        now = time.monotonic()
        if cached is not None and now < cached.expires_at:
            return cached
        meta = self._meta(view.name)
        if meta is None:
            return None
        try:
            generation = self._open(view, meta, expires_at=now + CACHE_S)
        except KeyStoreUnavailable:
            if cached is None or cached.stamp != meta.stamp or now > cached.opened_at + KEPT_S:
                raise
            generation = replace(cached, expires_at=now + RETRY_S)
        except FalajError:  # a refused key must not be used again in a later outage
            self._forget(view)
            raise
        self._cache[view.name, view.version] = generation
        return generation

    def _open(self, view: ViewSpec, meta: Meta, *, expires_at: float) -> _Generation:
        if meta.format != FORMAT:
            raise OnlineStoreOutdated(
                f"The online rows of view '{view.name}' have format {meta.format}, this release reads {FORMAT}. Run "
                f"`python -m feature_jobs.materialize view={view.name}` with this release."
            )
        wanted = [(field.name, field.dtype) for field in view.fields]
        plans = tuple(layout.plan(wanted) for layout in meta.layouts)
        classes = sorted({part.sensitivity for plan in plans for part in plan.parts})
        cipher = RowCipher.open(self._keys, view.name, meta.data_keys, classes)
        return _Generation(
            meta=meta,
            stamp=meta.stamp,
            plans=plans,
            cipher=cipher,
            expires_at=expires_at,
            opened_at=time.monotonic(),
        )
