"""The online state of one entity of an aggregated view: its events in tiles of time, with a summary of each tile.

A window (t - w, t] is computed from summaries and events. If a tile is completely inside the window, its summary is
used. Two kinds of tiles are read event by event: the tile that contains the window's start, and tiles with versions
that became known after t. The window's end needs no check, because an event is known only after it happened. The result
is exactly that of `offline/window_values.py` for the same instant and the same known rows.

A value cannot be removed from a sketch, a minimum or a maximum, so corrections and tombstones need the events. Packed
events are stored for the length of the longest window. An entity needs about 60 bytes plus the values for each event,
and at most about 260 summaries. Adding an event unpacks no other event. A correction unpacks the tile of its event.

Events may arrive in any order, late and repeatedly. A version of an event is identified by (event_id, created, seq).
Each event keeps only the versions that a read at some instant may need. An event is dropped when its last version has
been known for the length of the longest window. An older version of the event that arrives after that is too old for
every window. There is one exception: a version whose event time is after its created time, if it arrives later than its
correction by more than the longest window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from cluster.errors import OnlineStoreOutdated
from feature_jobs.store.aggregation.event_versions import Event, Version, newest_versions, with_version
from feature_jobs.store.aggregation.hyperloglog import value_hash
from feature_jobs.store.aggregation.partials import Partial, RankedValue, add, answer, empty, updates_for
from feature_jobs.store.definitions.aggregations import ALL_EVENTS, Function, WindowSpec

FORMAT = 1
"""Version of the packed format."""
_KEY_BYTES = 8
_MAX_TILES = 256
_BEGINNING = -(1 << 62)
"""A time before all others."""
NO_INSTANT = 1 << 62
"""`since_us` of a state that lacks events and therefore has no values at any instant."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """One version of an event. Times are UTC microseconds."""

    event_id: int | str
    event_us: int
    created_us: int
    seq: int
    values: tuple[Any, ...] | None
    """Values in the order of `WindowSpec.columns`, timestamps as microseconds. None for a tombstone."""


class _TilingOutput(NamedTuple):
    """One feature of the view."""

    window_us: int
    column: int | None
    """Index of the column. None counts events."""
    function: Function


class Tiling:
    """Division of a view's events into tiles of equal width.

    A tile is a quarter of the shortest window, or wider if the longest window would have more than `_MAX_TILES` tiles.
    """

    def __init__(self, windows: WindowSpec) -> None:
        lengths = [output.window_us for output in windows.outputs]
        self.longest_us = max(lengths)
        self.width_us = max(min(lengths) // 4, self.longest_us // _MAX_TILES, 1)
        self.windows_us = tuple(dict.fromkeys(lengths))
        columns = list(windows.columns)
        self.updates = tuple(
            updates_for(Function(output.function) for output in windows.outputs if output.column == column)
            for column in columns
        )
        """The updates of each column's partial aggregate."""
        self.outputs = tuple(
            _TilingOutput(
                output.window_us,
                None if output.column == ALL_EVENTS else columns.index(output.column),
                Function(output.function),
            )
            for output in windows.outputs
        )


class WindowState:
    """The events of one entity."""

    def __init__(self, tiling: Tiling, *, since_us: int = _BEGINNING) -> None:
        self._tiling = tiling
        self.since_us = since_us
        """The earliest instant with values. Events that earlier instants need were dropped."""
        self._tiles: dict[int, _Tile] = {}

    @classmethod
    def unpack(cls, tiling: Tiling, packed: bytes) -> WindowState:
        """Rebuild a state from the bytes of `pack`.

        Raises:
            OnlineStoreOutdated: The bytes have another format.
        """
        packed_format, since_us, tiles = msgpack.unpackb(packed)
        if packed_format != FORMAT:
            raise OnlineStoreOutdated(
                f"A stored window state has format {packed_format}, this release reads {FORMAT}. "
                "Materialise the view again."
            )
        state = cls(tiling, since_us=since_us)
        state._tiles = {number: _Tile(*fields) for number, *fields in tiles}
        return state

    def pack(self) -> bytes:
        """Pack the state as bytes."""
        tiles = [[number, *self._tiles[number].packed_fields()] for number in sorted(self._tiles)]
        return bytes(msgpack.packb([FORMAT, self.since_us, tiles]))

    @property
    def newest_us(self) -> int:
        """The time at which the last version of any event became known."""
        return max((tile.last_us for tile in self._tiles.values()), default=_BEGINNING)

    def rows(self) -> Iterator[EventRow]:
        """Yield all stored versions."""
        for tile in self._tiles.values():
            for event_id, _, versions in tile.event_lists():
                for created_us, seq, event_us, values in versions:
                    row_values = None if values is None else tuple(values)
                    yield EventRow(event_id, event_us, created_us, seq, row_values)

    def apply(self, row: EventRow, *, was: int | None = None) -> bool:
        """Add a version of an event. Return whether the state changed.

        Args:
            row: The version.
            was: The version's previous, provisional sequence number, if it had one.
        """
        key = _event_key(row.event_id)
        values = None if row.values is None else _without_negative_zeros(row.values)
        version = Version(row.created_us, row.seq, row.event_us, values)
        for number, tile in self._tiles.items():
            position = tile.find(key, row.event_id)
            if position is not None:
                return self._correct(number, position, key, with_version(tile.events[position], version, was))
        self._append(key, Event(row.event_id, version.known_us, [version]))
        return True

    def values(self, as_of_us: int) -> list[Any] | None:
        """Return the view's features at an instant, or None if the instant is before `since_us`.

        Raises:
            InvalidRequest: A sum of whole numbers is outside int64.
        """
        if as_of_us < self.since_us:
            return None
        windows = {
            window_us: self._window(as_of_us, as_of_us - window_us) for window_us in self._tiling.windows_us
        }
        return [
            windows[window_us].answer(column, function)
            for window_us, column, function in self._tiling.outputs
        ]

    def expire(self, now_us: int) -> None:
        """Drop everything that no read at this instant or later needs."""
        for number, tile in list(self._tiles.items()):
            if tile.last_us + self._tiling.longest_us <= now_us:
                del self._tiles[number]
            elif tile.has_corrections and tile.last_us <= now_us:
                newest = [event._replace(versions=newest_versions(event.versions)) for event in tile.events]
                tile.replace_events(newest, self._tiling)
        self.since_us = max(self.since_us, now_us)

    def _correct(self, number: int, position: int, key: bytes, changed: Event) -> bool:
        """Replace an event of a tile. Return False if it is equal to the stored one."""
        tile = self._tiles[number]
        if changed == tile.events[position]:
            return False
        events = list(tile.events)
        if self._tile_number(changed) == number:
            events[position] = changed
            tile.replace_events(events, self._tiling)
            return True
        del events[position]
        if events:
            tile.replace_events(events, self._tiling)
        else:
            del self._tiles[number]
        self._append(key, changed)
        return True

    def _append(self, key: bytes, event: Event) -> None:
        self._tiles.setdefault(self._tile_number(event), _Tile()).append(key, event, self._tiling)

    def _tile_number(self, event: Event) -> int:
        return event.newest.event_us // self._tiling.width_us

    def _window(self, as_of_us: int, start_us: int) -> _Window:
        """Collect the events after `start_us` that are known at an instant, as whole tiles and single versions."""
        width_us = self._tiling.width_us
        tiles: list[_Tile] = []
        versions: list[list[Any]] = []
        for number, tile in self._tiles.items():
            tile_start_us, all_known = number * width_us, tile.last_us <= as_of_us
            if all_known and tile_start_us > start_us:
                tile.load_summary()
                tiles.append(tile)
            elif not all_known or tile_start_us + width_us > start_us:
                versions += tile.counting_versions(as_of_us, start_us)
        return _Window(tiles, versions)


class _Window:
    """The contents of one window at one instant."""

    def __init__(self, tiles: list[_Tile], versions: list[list[Any]]) -> None:
        self._tiles = tiles
        """Tiles that are completely inside the window, with loaded summaries."""
        self._versions = versions
        """Other versions, as unpacked lists."""
        self._partials: dict[int, list[Partial]] = {}
        self._values: dict[int, list[RankedValue]] = {}

    def answer(self, column: int | None, function: Function) -> Any:
        """Compute one feature. A column of None counts events."""
        if column is None:
            return sum(tile.num_events for tile in self._tiles) + len(self._versions)
        if column not in self._values:
            self._partials[column] = [tile.partials[column] for tile in self._tiles]
            self._values[column] = list(_ranked_values(self._versions, column))
        return answer(function, self._partials[column], self._values[column])


class _Tile:
    """The events of one interval of time, packed one after the other, and their summary.

    An event belongs to the tile of its newest version. The summary covers newest versions only. Reads work on unpacked
    lists, because they would take a third longer with `Event` and `Version` objects.
    """

    def __init__(
        self,
        last_us: int = _BEGINNING,
        has_corrections: bool = False,
        keys: bytes = b"",
        packed: bytes = b"",
        summary: bytes = b"",
    ) -> None:
        self.last_us = last_us
        """When the last version of any event became known."""
        self.has_corrections = has_corrections
        """Whether an event has several versions."""
        self._keys = keys
        self._packed = packed
        self._packed_summary = summary
        self._events: list[Event] | None = None
        self._event_lists: list[list[Any]] | None = None
        self._has_summary = False
        self.num_events = 0
        """Number of events without tombstones. Part of the summary."""
        self.partials: list[Partial] = []
        """One partial aggregate per column. Part of the summary."""

    def packed_fields(self) -> tuple[int, bool, bytes, bytes, bytes]:
        """Return the arguments that rebuild the tile."""
        if self._has_summary:
            self._packed_summary = msgpack.packb([self.num_events, self.partials], default=str)
        return self.last_us, self.has_corrections, self._keys, self._packed, self._packed_summary

    @property
    def events(self) -> list[Event]:
        """The events, in the order of their keys in `_keys`."""
        if self._events is None:
            self._events = [Event.from_lists(*fields) for fields in self.event_lists()]
        return self._events

    def event_lists(self) -> Sequence[Sequence[Any]]:
        """Return the events as lists with the fields of `Event`, for fast reads."""
        if self._events is not None:
            return self._events
        if self._event_lists is None:
            unpacker = msgpack.Unpacker(max_buffer_size=0)
            unpacker.feed(self._packed)
            self._event_lists = list(unpacker)
        return self._event_lists

    def load_summary(self) -> None:
        """Unpack `num_events` and `partials`."""
        if not self._has_summary:
            self.num_events, self.partials = msgpack.unpackb(self._packed_summary)
            self._has_summary = True

    def find(self, key: bytes, event_id: int | str) -> int | None:
        """Return the position of an event, or None if it is not in the tile."""
        offset = self._keys.find(key)
        while offset >= 0:
            position, remainder = divmod(offset, _KEY_BYTES)
            if remainder == 0 and self.events[position].event_id == event_id:
                return position
            offset = self._keys.find(key, offset + 1)
        return None

    def append(self, key: bytes, event: Event, tiling: Tiling) -> None:
        """Append an event. The other events stay packed.

        Args:
            key: The event's key, by which `find` finds it.
            event: The event.
            tiling: The view's tiling.
        """
        if not self._keys:
            self.partials = [empty() for _ in tiling.updates]
            self._has_summary = True
        if self._events is not None:
            self._events.append(event)
        self._event_lists = None
        self._keys += key
        self._packed += msgpack.packb(event)
        self.last_us = max(self.last_us, event.last_us)
        self.has_corrections = self.has_corrections or len(event.versions) > 1
        newest = event.newest
        if newest.values is not None:
            self.load_summary()
            self.num_events += 1
            for column, updates in enumerate(tiling.updates):
                for ranked in _ranked_values([newest], column):
                    add(self.partials[column], ranked, updates)

    def replace_events(self, events: Iterable[Event], tiling: Tiling) -> None:
        """Replace all events."""
        self.__init__()  # type: ignore[misc]
        for event in events:
            self.append(_event_key(event.event_id), event, tiling)

    def counting_versions(self, as_of_us: int, start_us: int) -> list[list[Any]]:
        """For each event in a window, return the newest version that is known at an instant. Leave out tombstones.

        Args:
            as_of_us: The instant.
            start_us: Start of the window. An event at this time is not in the window.
        """
        counting = []
        for _, _, versions in self.event_lists():
            for version in reversed(versions):
                created_us, _, event_us, values = version
                if created_us <= as_of_us and event_us <= as_of_us:
                    if values is not None and event_us > start_us:
                        counting.append(version)
                    break
        return counting


def _ranked_values(versions: Iterable[Sequence[Any]], column: int) -> Iterator[RankedValue]:
    """Yield a column's non-null values, each with the times and number by which `last` sorts. Accepts no tombstones."""
    for created_us, seq, event_us, values in versions:
        if values[column] is not None:
            yield event_us, created_us, seq, values[column]


def _event_key(event_id: int | str) -> bytes:
    return value_hash(event_id).to_bytes(_KEY_BYTES, "little")


def _without_negative_zeros(values: tuple[Any, ...]) -> list[Any]:
    return [value + 0.0 if isinstance(value, float) else value for value in values]
