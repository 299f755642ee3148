"""Feature values by view and entity: one packed row each, which only a greater (event, created, seq) replaces.

So rows may come in any order, twice, from a materialisation and from pushes at once, and the store is the same in the
end. A deleted entity keeps its row, without values: an older row that comes late cannot bring it back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.errors import OnlineStoreOutdated, SourceError
from cluster.security.encryption.envelope import ValueCipher
from cluster.security.encryption.parquet import CACHE_S
from cluster.security.keys.store import KeyRevoked, KeyStore, KeyStoreUnavailable
from feature_jobs.store.catalog.protection import online_key
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.views import Sensitivity
from feature_jobs.store.online.changes import Change, Merge
from feature_jobs.store.online.engine import NOTHING, Carry, Engine, Rows, Write
from feature_jobs.store.online.layout import Plan
from feature_jobs.store.online.meta import FORMAT, Meta, layout_of
from feature_jobs.store.online.rows import (
    EVERYTHING,
    Block,
    Found,
    Header,
    Horizon,
    OnlineRow,
    RowCipher,
    header_of,
    open_hash_key,
    rank_of,
)

RETRY_S = 1.0
"""After this the key store is asked again, where it could not be; values are read with the keys of before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A view's generation, as one version of the view reads it."""

    meta: Meta
    stamp: bytes
    plans: tuple[Plan, ...]
    """By layout."""
    cipher: RowCipher
    until: float
    """When the keys have to be asked for again, by the monotonic clock."""


_Lying: TypeAlias = tuple[_Opened, Sequence[bytes], Sequence[bytes | None]]
"""A view's generation, where its entities' rows lie, and the rows."""


class OnlineStore:
    """Feature values in one engine, with the keys that this process may use."""

    def __init__(self, engine: Engine, keys: KeyStore) -> None:
        self.engine = engine
        self._keys = keys
        self._known: dict[tuple[str, str], _Opened] = {}

    def get(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]) -> list[Found | None]:
        """The rows of entities, in order; none where nothing is known, or what was known has been deleted.

        The values stand in the order of this version of the view, whichever version wrote them; a feature that was not
        written, or with another dtype, is null.

        Raises:
            AccessDenied, KeyRevoked: the keys of a class that the view has are not given to this process.
            ArtifactTampered: a value is not the one that was written there.
            OnlineStoreOutdated: another release wrote the rows; the same holds for `put` and `update`.
            OnlineStoreUnavailable: the engine cannot be reached.
        """
        return [one if one and one[3] else None for one in self._found(view, keys)]

    def _found(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]) -> list[Found | None]:
        asked = [key for key in keys if key is not None]
        lying = self._lying(view, asked)
        if lying is None:
            return [None for _ in keys]
        opened, addresses, rows = lying
        found = opened.cipher.unpack(addresses, rows, opened.plans)
        if len(asked) == len(keys):
            return found
        known = iter(found)
        return [None if key is None else next(known) for key in keys]

    def read(
        self, view: ViewSpec, keys: Sequence[tuple[int | str, ...] | None]
    ) -> Block | list[Found | None]:
        """As `get`, but column by column where every row is there and whole, and with a row without values where what
        was known has been deleted; raises as `get`."""
        known = [key for key in keys if key is not None]
        if len(known) < len(keys) or (lying := self._lying(view, known)) is None:
            return self._found(view, keys)
        opened, addresses, rows = lying
        block = opened.cipher.block(addresses, rows, opened.plans)
        return opened.cipher.unpack(addresses, rows, opened.plans) if block is None else block

    def _lying(self, view: ViewSpec, keys: Sequence[tuple[int | str, ...]]) -> _Lying | None:
        """What lies in the store of entities; none before the view's first row."""
        while (opened := self._opened(view)) is not None:
            addresses = opened.cipher.addresses(keys)
            rows = self.engine.rows(view.name, opened.stamp, addresses)
            if rows is not None:
                return opened, addresses, rows
            self._known.pop((view.name, view.version), None)  # another generation is there by now
        return None

    def put(self, view: ViewSpec, key_types: Mapping[str, str], rows: Sequence[OnlineRow]) -> int:
        """Write rows where no greater ones lie, all in one transaction; gives how many were written.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
            OnlineStoreUnavailable: the engine cannot be reached, or is full.
        """
        return self._write(view, key_types, [(row, b"") for row in rows])

    def settle(
        self, view: ViewSpec, key_types: Mapping[str, str], rows: Sequence[tuple[OnlineRow, int]]
    ) -> int:
        """Give pushed rows that are still the greatest of their entities the `ingest_seq` that they got; raises as
        `put`."""
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
        """Put a view's rows in place of all it had; gives how many entities they are.

        Of rows that lie in an older format nothing counts beside the new ones: nobody can say whose they are.

        Args:
            view: whose.
            key_types: of its join keys.
            rows: one an entity.
            horizon: what the rows were taken from. A row in the store from beyond it counts beside them.
            merge: how it does, where an entity's row is not one row of the table.

        Raises:
            SourceError: another materialisation of the view came meanwhile; nothing was changed.
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says; the old rows stay.
            OnlineStoreUnavailable: the engine cannot be reached, or is full; the old rows stay.
        """
        name, before = view.name, self._meta(view.name)
        began = before.generation if before else None
        hash_key = self._hash_key(name, before)
        classes = layout_of(view).classes
        cipher, wrapped = RowCipher.create(self._keys, name, classes, hash_key=hash_key)
        meta = Meta.new(view, key_types, wrapped, whole=True)
        counter = _Counter()
        self.engine.stage(name, meta.generation, counter.packed(rows, cipher, meta))
        while True:
            stamp = before.stamp if before else None
            carry = self._carry(view, before if hash_key else None, cipher, meta, horizon, merge)
            if self.engine.switch(name, stamp, meta.pack(), carry):
                return counter.entities
            before = self._meta(name)
            if (before.generation if before else None) != began:
                raise SourceError(
                    f"View '{name}' was materialised by another job meanwhile, or got its first pushed rows; this one "
                    "changed nothing. Run it again."
                )

    def update(self, view: ViewSpec, key_types: Mapping[str, str], changes: Sequence[Change]) -> None:
        """Change rows by what lies there: where another writer was in between, by what lies there then; raises as
        `put`.

        Args:
            view: whose.
            key_types: of its join keys.
            changes: one an entity.
        """
        while changes:
            opened, number = self._for_writing(view, key_types)
            addresses = opened.cipher.addresses([change.keys for change in changes])
            lying = self.engine.rows(view.name, opened.stamp, addresses)
            if lying is not None:
                writes = self._changed(opened, number, changes, lying)
                written = self.engine.put(view.name, opened.stamp, writes) if writes else 0
                if written == len(writes):
                    return
                if written is not None:
                    continue
            self._known.pop((view.name, view.version), None)

    def is_whole(self, view: str) -> bool:
        """Whether nothing is known of the entities that the view has no row of, because it was materialised."""
        meta = self._meta(view)
        return meta is not None and meta.whole

    def key_types(self, view: str) -> Mapping[str, str]:
        """How a view's keys are stored; empty before its first row."""
        meta = self._meta(view)
        return {} if meta is None else meta.key_types

    def hold_key_types(self, view: str, key_types: Mapping[str, str]) -> None:
        """Have a view's keys read as its feature table stores them, where pushes came before the table."""
        meta = self._meta(view)
        if meta is not None and dict(meta.key_types) != dict(key_types):
            self.engine.change(view, meta.stamp, meta.with_key_types(key_types).pack())

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _write(
        self, view: ViewSpec, key_types: Mapping[str, str], rows: Sequence[tuple[OnlineRow, bytes]]
    ) -> int:
        if not rows:
            return 0
        while True:
            opened, number = self._for_writing(view, key_types)
            layout, cipher = opened.meta.layouts[number], opened.cipher
            placed = [(cipher.address(row.keys), row, expected) for row, expected in rows]
            writes = [
                Write(address, cipher.pack(address, row, layout, number), expected)
                for address, row, expected in placed
            ]
            written = self.engine.put(view.name, opened.stamp, writes)
            if written is not None:
                return written
            self._known.pop((view.name, view.version), None)

    def _for_writing(self, view: ViewSpec, key_types: Mapping[str, str]) -> tuple[_Opened, int]:
        """The view's generation and the layout to write in; both are made where they are not there yet."""
        while True:
            opened = self._opened(view)
            if opened is None:
                _, wrapped = RowCipher.create(self._keys, view.name, layout_of(view).classes)
                self.engine.change(view.name, None, Meta.new(view, key_types, wrapped, whole=False).pack())
                continue
            if dict(opened.meta.key_types) != dict(key_types):
                # Keys came here before the feature table decided their types, and the table decided otherwise.
                self.engine.change(view.name, opened.stamp, opened.meta.with_key_types(key_types).pack())
                self._known.pop((view.name, view.version), None)
                continue
            number = opened.meta.layout_number(view)
            if number is not None:
                return opened, number
            missing = set(layout_of(view).classes) - {*opened.meta.data_keys, Sensitivity.PUBLIC}
            added = {name: ValueCipher.create(self._keys, online_key(view.name, name))[1] for name in missing}
            self.engine.change(view.name, opened.stamp, opened.meta.with_layout(view, added).pack())
            self._known.pop((view.name, view.version), None)

    def _carry(
        self,
        view: ViewSpec,
        before: Meta | None,
        cipher: RowCipher,
        meta: Meta,
        horizon: Horizon,
        merge: Merge | None,
    ) -> Carry:
        """Packs the rows of before that are not in the horizon for the new generation, or what they are merged to."""
        layout = meta.layouts[0]
        plan = layout.plan([(field.name, field.dtype) for field in view.fields])

        def carry(rows: Sequence[tuple[bytes, bytes, bytes | None]]) -> Rows:
            if merge is None:
                rows = [row for row in rows if not horizon.covers(header_of(row[1]).seq)]
            if not rows or before is None:
                return []
            opened = self._open(view, before, until=0.0)
            places = [place for place, _, _ in rows]
            old = opened.cipher.unpack(places, [packed for _, packed, _ in rows], opened.plans)
            new = cipher.unpack(places, [staged if merge else None for _, _, staged in rows], [plan])
            kept = []
            for (place, packed, staged), said, beside in zip(rows, old, new, strict=True):
                row: OnlineRow | None
                row = lay = _row_of(header_of(packed), said)
                if merge is not None:
                    there = None if staged is None else _row_of(header_of(staged), beside)
                    row = merge(there, lay, horizon)
                if row is not None:
                    kept.append((place, cipher.pack(place, row, layout, 0)))
            return kept

        return carry

    def _changed(
        self, opened: _Opened, number: int, changes: Sequence[Change], lying: Sequence[bytes | None]
    ) -> list[Write]:
        """What changes make of the rows that lie there."""
        addresses = opened.cipher.addresses([change.keys for change in changes])
        said = opened.cipher.unpack(addresses, lying, opened.plans)
        writes = []
        for change, address, packed, found in zip(changes, addresses, lying, said, strict=True):
            before = None if packed is None else _row_of(header_of(packed), found)
            row = change.made(before, opened.meta.whole)
            if row is not None:
                content = opened.cipher.pack(address, row, opened.meta.layouts[number], number)
                writes.append(Write(address, content, NOTHING if before is None else rank_of(before)))
        return writes

    def _hash_key(self, view: str, before: Meta | None) -> bytes | None:
        """The addresses' key of before; none where there is none, or what it protected is gone or cannot be read."""
        if before is None or before.format != FORMAT:
            return None
        try:
            return open_hash_key(self._keys, view, before.data_keys)
        except KeyRevoked:
            return None

    def _meta(self, view: str) -> Meta | None:
        packed = self.engine.meta(view)
        return None if packed is None else Meta.unpack(packed)

    def _opened(self, view: ViewSpec) -> _Opened | None:
        """The view's generation and its data keys, asked for once in a while; none before the view's first row."""
        known = self._known.get((view.name, view.version))
        now = time.monotonic()
        if known is not None and now < known.until:
            return known
        meta = self._meta(view.name)
        if meta is None:
            return None
        try:
            opened = self._open(view, meta, until=now + CACHE_S)
        except KeyStoreUnavailable:
            if known is None or known.stamp != meta.stamp:
                raise
            opened = replace(known, until=now + RETRY_S)
        self._known[view.name, view.version] = opened
        return opened

    def _open(self, view: ViewSpec, meta: Meta, *, until: float) -> _Opened:
        if meta.format != FORMAT:
            raise OnlineStoreOutdated(
                f"The online rows of view '{view.name}' lie in format {meta.format}, this release reads {FORMAT}. Run "
                f"`python -m feature_jobs.materialize view={view.name}` with this release."
            )
        wanted = [(field.name, field.dtype) for field in view.fields]
        plans = tuple(layout.plan(wanted) for layout in meta.layouts)
        classes = sorted({name for plan in plans for _, name, _, _ in plan.parts})
        cipher = RowCipher.open(self._keys, view.name, meta.data_keys, classes)
        return _Opened(meta=meta, stamp=meta.stamp, plans=plans, cipher=cipher, until=until)


def _row_of(header: Header, found: Found | None) -> OnlineRow:
    """A row that lies in the store, but for its keys."""
    return OnlineRow(
        keys=(),
        event_us=header.event_us,
        created_us=header.created_us,
        seq=header.seq,
        values=found[3] if found else (),
        deleted=header.deleted,
    )


class _Counter:
    """Packs rows one by one, and counts those that are not deleted."""

    def __init__(self) -> None:
        self.entities = 0

    def packed(
        self, rows: Iterable[OnlineRow], cipher: RowCipher, meta: Meta
    ) -> Iterator[tuple[bytes, bytes]]:
        layout = meta.layouts[0]
        for row in rows:
            address = cipher.address(row.keys)
            self.entities += not row.deleted
            yield address, cipher.pack(address, row, layout, 0)
