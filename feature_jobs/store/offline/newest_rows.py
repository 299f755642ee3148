"""Find the row that each entity row is joined with. The feature rows come in pieces, so memory does not grow with them.

`point_in_time.py` defines the result: of the rows that are available at the entity row's time, the greatest by (event,
created, seq). The greatest row of all pieces is the greatest of the rows found in each piece. So one piece is searched
at a time, and only the greatest row so far is kept for each entity row.

Rows and entity rows become whole numbers, `entity << bits | position`, where a position counts rows in order of
availability. After one sort of these numbers, the rows of an entity are neighbours, and a binary search finds the last
row that is available at a time. This row may be outdated: an earlier row of the entity can have a greater event time. A
running maximum of event times shows which rows are outdated, and which row is the result instead.

A running minimum in the other direction shows whether a row that is not available yet has an event time in the past.
Only then can the cutoff hide a row. This is rare, so these entities are searched again by event time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_CODE_BITS = 31
_CODE = "__code"
_NOTHING = np.iinfo(np.int64).min


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityRows:
    """Entity rows, sorted by entity and time."""

    frame: pl.DataFrame
    """The sorted rows, with their join keys and `event_timestamp`."""
    order: Ints
    """Position that each sorted row had in the input."""
    codes: Ints
    """A number below 2^31 for each entity, ascending; -1 for a null key."""
    times: Ints
    """Times in microseconds."""
    by_time: Ints
    """Positions of the sorted rows in order of time."""
    names: pl.DataFrame | Ints | int
    """How the join keys of feature rows become codes: a frame of keys and codes; or the sorted values of the only key,
    whose positions are the codes; or the least value of the only key, which has code 0."""

    def codes_of(self, rows: pl.DataFrame) -> tuple[Ints, Ints | None]:
        """Return the codes of feature rows of these entities and the rows' positions; None instead of all positions."""
        if isinstance(self.names, pl.DataFrame):
            keys = self.names.columns[:-1]
            joined = rows.select(keys).join(self.names, on=keys, how="left", maintain_order="left")[_CODE]
            kept = joined.is_not_null().to_numpy()
            codes = joined.fill_null(-1).to_numpy()
        else:
            [column] = self.frame.columns[:1]
            kept = rows[column].is_not_null().to_numpy()
            values = rows[column].fill_null(0).to_numpy()
            if isinstance(self.names, int):
                top = self.names + int(self.codes[-1])
                kept &= (values >= self.names) & (values <= top)
                codes = np.where(kept, values, self.names) - self.names
            else:
                codes = np.searchsorted(self.names, values)
                kept &= self.names[np.minimum(codes, self.names.size - 1)] == values
        if kept.all():
            return codes, None
        return codes[kept], np.flatnonzero(kept)


def sort_entities(entities: pl.DataFrame, keys: Sequence[str]) -> EntityRows:
    """Sort entity rows, which have join keys, `event_timestamp` in microseconds and any other columns."""
    frame = entities.select(*keys, pl.all().exclude(*keys))
    codes, names = _encode(frame, list(keys))
    times = frame[EVENT].to_physical().to_numpy()
    order = np.lexsort((times, codes))
    times = times[order]
    return EntityRows(
        frame=frame[order],
        order=order,
        codes=codes[order],
        times=times,
        by_time=np.argsort(times, kind="stable"),
        names=names,
    )


def _encode(frame: pl.DataFrame, keys: list[str]) -> tuple[Ints, pl.DataFrame | Ints | int]:
    first = frame[keys[0]]
    if len(keys) > 1 or first.dtype != pl.Int64 or first.null_count() or frame.is_empty():
        names = frame.select(keys).unique().drop_nulls().with_row_index(_CODE)
        names = names.select(*keys, pl.col(_CODE).cast(pl.Int64))
        coded = frame.select(keys).join(names, on=keys, how="left", maintain_order="left")
        return coded[_CODE].fill_null(-1).to_numpy(), names
    values = first.to_numpy()
    least = int(values.min())
    if int(values.max()) - least < 1 << _CODE_BITS:
        return values - least, least
    known, codes = np.unique(values, return_inverse=True)
    return codes, known


class _Rows(NamedTuple):
    """Rows of a piece, by position in their file."""

    event: Ints
    created: Ints
    seq: Ints
    deleted: Bools | None


class _Greatest:
    """The greatest row so far of each entity row, by (event, created, seq)."""

    def __init__(self, count: int) -> None:
        self.event, self.created, self.seq = (np.full(count, _NOTHING) for _ in range(3))
        self.deleted = np.zeros(count, dtype=np.bool_)
        self.piece, self.row = np.full(count, -1, dtype=np.int32), np.full(count, -1)

    def update(self, entities: Ints, rows: _Rows, found: Ints, *, piece: int) -> None:
        """Replace the rows of some entity rows by rows of a piece, if those are greater."""
        event, created, seq = rows.event[found], rows.created[found], rows.seq[found]
        if piece:
            old = self.event[entities], self.created[entities], self.seq[entities]
            greater = _is_greater((event, created, seq), old)
            entities, found = entities[greater], found[greater]
            event, created, seq = event[greater], created[greater], seq[greater]
        self.event[entities], self.created[entities], self.seq[entities] = event, created, seq
        self.piece[entities], self.row[entities] = piece, found
        if rows.deleted is not None:
            self.deleted[entities] = rows.deleted[found]

    def is_valid(self, times: Ints, ttl_us: int | None) -> Bools:
        """Return which entity rows have a row that is neither a tombstone nor expired."""
        valid: Bools = (self.piece >= 0) & ~self.deleted
        return valid if ttl_us is None else valid & (self.event >= times - ttl_us)

    def is_greater(self, other: _Greatest) -> Bools:
        """Return which rows are greater than those of another object."""
        return _is_greater((self.event, self.created, self.seq), (other.event, other.created, other.seq))


def _is_greater(one: tuple[Ints, Ints, Ints], other: tuple[Ints, Ints, Ints]) -> Bools:
    greater: Bools = one[2] > other[2]
    for a, b in (one[1], other[1]), (one[0], other[0]):
        greater = (a > b) | ((a == b) & greater)
    return greater


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The row that each entity row is joined with, in the order of `EntityRows`."""

    piece: npt.NDArray[np.int32]
    """Number of the piece; undefined if the entity row has no result."""
    row: Ints
    """Position of the row in its piece."""
    absent: Bools
    """Which entity rows have no result."""
    hidden: int
    """Number of entity rows that have no result only because of the cutoff."""


class NewestRows:
    """Searches pieces of the feature rows one after another."""

    def __init__(self, entities: EntityRows, *, ttl_us: int | None, cutoff: bool) -> None:
        self._entities, self._ttl_us, self._cutoff = entities, ttl_us, cutoff
        self._known, self._late = (_Greatest(entities.times.size) for _ in range(2))
        self._pieces = self._rows = 0

    def add(self, rows: pl.DataFrame, *, order: Ints | None = None) -> None:
        """Search one piece.

        Args:
            rows: join keys, `event_timestamp`, `created_timestamp`, `ingest_seq`, and `deleted` if there may be
                tombstones. Without `ingest_seq`, all pieces together must be in order.
            order: positions of the rows in order of (available, event, created, seq); None if they are in order.
        """
        codes, kept = self._entities.codes_of(rows)
        if codes.size:
            if order is not None:
                codes, kept = _reorder(codes, kept, order)
            self._search(rows, codes, kept)
        self._pieces += 1
        self._rows += rows.height

    def found(self) -> Found:
        """Return the result over all pieces."""
        known, late, times = self._known, self._late, self._entities.times
        absent = ~known.is_valid(times, self._ttl_us)
        hidden = absent & late.is_valid(times, self._ttl_us) & late.is_greater(known)
        return Found(piece=known.piece, row=known.row, absent=absent, hidden=int(np.count_nonzero(hidden)))

    def _search(self, rows: pl.DataFrame, codes: Ints, kept: Ints | None) -> None:
        content = self._content(rows)
        if not self._cutoff:
            event = content.event if kept is None else content.event[kept]
            order = np.argsort(event, kind="stable")
            codes, kept = codes[order], order if kept is None else kept[order]
        event = content.event if kept is None else content.event[kept]
        created = content.created if kept is None else content.created[kept]
        available = np.maximum(event, created) if self._cutoff else event
        timeline = _Timeline.build(codes, event, late=bool((available > event).any()))
        entities = self._entities
        limits = np.empty_like(entities.times)
        limits[entities.by_time] = np.searchsorted(available, entities.times[entities.by_time], side="right")
        at = timeline.first_at_or_after(entities.codes, limits)
        has_row, found = timeline.newest_before(at, entities.codes)
        self._update(self._known, np.flatnonzero(has_row), content, found[has_row], kept)
        if timeline.combined is not None:
            waiting = timeline.may_be_hidden(at, entities.codes, entities.times)
            if content.deleted is None:
                waiting &= ~self._known.is_valid(entities.times, self._ttl_us)
            if waiting.any():
                waits = np.flatnonzero(waiting)
                newest = timeline.newest_by_event(at[waits], entities.codes[waits], entities.times[waits])
                self._update(self._late, waits, content, newest, kept)

    def _content(self, rows: pl.DataFrame) -> _Rows:
        return _Rows(
            event=rows[EVENT].to_physical().to_numpy(),
            created=rows[CREATED].to_physical().to_numpy(),
            seq=rows[SEQ].to_numpy() if SEQ in rows.columns else np.arange(rows.height) + self._rows,
            deleted=rows[DELETED].fill_null(False).to_numpy() if DELETED in rows.columns else None,
        )

    def _update(
        self, greatest: _Greatest, entities: Ints, content: _Rows, found: Ints, kept: Ints | None
    ) -> None:
        greatest.update(entities, content, found if kept is None else kept[found], piece=self._pieces)


def _reorder(codes: Ints, kept: Ints | None, order: Ints) -> tuple[Ints, Ints]:
    """Bring codes, and the positions of their rows, into an order of all rows."""
    if kept is None:
        return codes[order], order
    every = np.full(order.size, -1)
    every[kept] = codes
    in_order = every[order]
    chosen = in_order >= 0
    return in_order[chosen], order[chosen]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timeline:
    """The rows of a piece, sorted by entity and then by availability."""

    bits: int
    packed: Ints
    """`code << bits | row`, ascending."""
    row: Ints
    code: Ints
    event: Ints
    group: Ints
    """Number of the row's entity in this piece; empty if no row is late."""
    combined: Ints | None
    """`group << … | event`; None if no row is late."""
    event_mask: int
    event_values: Ints | int
    """The event times that the lower bits of `combined` count, or the event time that they count from."""

    @classmethod
    def build(cls, codes: Ints, event: Ints, *, late: bool) -> _Timeline:
        """Sort rows, which are in order of availability. `late`: whether a row may become available after its event."""
        bits = codes.size.bit_length()
        packed = codes << bits
        packed |= np.arange(codes.size)
        packed.sort()
        row, code = packed & ((1 << bits) - 1), packed >> bits
        event = event[row]
        group, combined, mask = np.empty(0, np.int64), None, 0
        values: Ints | int = 0
        if late:
            group = np.cumsum(np.concatenate([[False], code[1:] != code[:-1]]), dtype=np.int64)
            combined, mask, values = _combine(group, event)
        return cls(
            bits=bits, packed=packed, row=row, code=code, event=event, group=group,
            combined=combined, event_mask=mask, event_values=values,
        )  # fmt: skip

    def first_at_or_after(self, codes: Ints, rows: Ints) -> Ints:
        """Return the index of an entity's first row at or after some row, or where it would be."""
        return np.searchsorted(self.packed, (codes << self.bits) | rows)

    def newest_before(self, at: Ints, codes: Ints) -> tuple[Bools, Ints]:
        """Return whether the entity has a row before an index, and the row of these with the greatest event time."""
        before = np.maximum(at - 1, 0)
        has_row = (at > 0) & (self.code[before] == codes)
        if self.combined is not None:
            up_to_date = self.combined == np.maximum.accumulate(self.combined)
            before = np.maximum.accumulate(np.where(up_to_date, np.arange(up_to_date.size), 0))[before]
        return has_row, self.row[before]

    def may_be_hidden(self, at: Ints, codes: Ints, times: Ints) -> Bools:
        """Return whether the entity has a row at or after an index whose event is not after a time."""
        assert self.combined is not None
        after = np.minimum(at, self.code.size - 1)
        least = np.minimum.accumulate(self.combined[::-1])[::-1][after] & self.event_mask
        values = self.event_values
        events: Ints = least + values if isinstance(values, int) else values[least]
        may_be: Bools = (at < self.code.size) & (self.code[after] == codes) & (events <= times)
        return may_be

    def newest_by_event(self, at: Ints, codes: Ints, times: Ints) -> Ints:
        """Return the entity's last row by (event, order) whose event is not after a time. There must be one."""
        is_searched = np.zeros(int(self.group[-1]) + 1, dtype=np.bool_)
        is_searched[self.group[at]] = True
        chosen = np.flatnonzero(is_searched[self.group])
        moments = np.unique(self.event[chosen])
        keys = (self.code[chosen] << _CODE_BITS) | np.searchsorted(moments, self.event[chosen])
        order = np.argsort(keys, kind="stable")
        wanted = (codes << _CODE_BITS) | np.searchsorted(moments, times, side="right")
        return self.row[chosen[order[np.searchsorted(keys[order], wanted) - 1]]]


def _combine(groups: Ints, values: Ints) -> tuple[Ints, int, Ints | int]:
    """Combine ascending groups with values, as one number each. Return also the mask and the meaning of its bits."""
    least = int(values.min())
    width = (int(values.max()) - least).bit_length()
    if int(groups[-1]).bit_length() + width < 64:
        return (groups << width) | (values - least), (1 << width) - 1, least
    known, ranks = np.unique(values, return_inverse=True)
    width = known.size.bit_length()
    return (groups << width) | ranks, (1 << width) - 1, known
