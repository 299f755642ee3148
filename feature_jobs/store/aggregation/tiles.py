"""The online state of one entity of an aggregated view: its events in tiles of time, and what each tile has in short.

A window (t - w, t] is read from the summaries of the tiles that lie in it, and from the events themselves of the tile
that its old edge cuts and of those that hold knowledge from after t; its new edge cuts none, because an event is known
only after it happened. So the answer is that of `windows` for the same instant and knowledge, exactly.

Sketches and extremes cannot be taken back, so corrections and tombstones need the events: they are kept, packed, for as
long as the longest window. Memory per entity is that of the events in it (about 60 bytes and their values each) and of
at most some 260 summaries. Adding an event unpacks no other one; a correction unpacks the tile it touches.

Events come in any order, late and repeatedly: a version of an event is identified by (event_id, created, seq), and each
event keeps those of its versions that count at some time. An event is forgotten one longest window after all its
versions were known. Its older versions are then too old to count again, should they come, but for one case: a version
dated ahead (event after created) that comes for the first time a longest window after what corrected it.

A pushed version goes by a provisional number, behind all that are final, until it gets its own. Which of its event's
final ones with equal created will then be behind it is open until that moment, so these are kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from feature_jobs.store.aggregation.hyperloglog import value_hash
from feature_jobs.store.aggregation.partials import Ranked, add, answer, empty
from feature_jobs.store.definitions.aggregations import EVERY, WindowSpec
from feature_jobs.store.types.schema import PROVISIONAL

FORMAT = 1
_ID_BYTES = 8
_MOST_TILES = 256
_BEGINNING = -(1 << 62)
NEVER = 1 << 62
"""`since_us` of a state that lacks events, and so says nothing."""

Version = list[Any]
"""Created, seq, event and values of one version of an event; the values of a tombstone are none."""
Event = list[Any]
"""The id, when the last of all its versions was known, and the versions that count at some time, by (created, seq)."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """One version of an event. Times are UTC microseconds."""

    event_id: int | str
    event_us: int
    created_us: int
    seq: int
    values: tuple[Any, ...] | None
    """In the order of `WindowSpec.columns`, timestamps as microseconds; none of a tombstone."""


class Tiling:
    """How a view's events are cut into tiles: four to the shortest window, unless the longest would have too many."""

    def __init__(self, windows: WindowSpec) -> None:
        spans = [output.window_us for output in windows.outputs]
        self.longest_us = max(spans)
        self.width_us = max(min(spans) // 4, self.longest_us // _MOST_TILES, 1)
        self.spans = tuple(dict.fromkeys(spans))
        columns = list(windows.columns)
        self.functions = tuple(
            frozenset(output.function for output in windows.outputs if output.column == column)
            for column in columns
        )
        self.outputs = tuple(
            (
                output.window_us,
                None if output.column == EVERY else columns.index(output.column),
                output.function,
            )
            for output in windows.outputs
        )


class WindowState:
    """One entity's events."""

    def __init__(self, tiling: Tiling, *, since_us: int = _BEGINNING) -> None:
        self._tiling = tiling
        self.since_us = since_us
        """Before this nothing can be said any more."""
        self._tiles: dict[int, _Tile] = {}

    @classmethod
    def unpack(cls, tiling: Tiling, packed: bytes) -> WindowState:
        """The state that `pack` gave, of the same view."""
        known, since_us, tiles = msgpack.unpackb(packed)
        assert known == FORMAT
        state = cls(tiling, since_us=since_us)
        state._tiles = {number: _Tile(*parts) for number, *parts in tiles}
        return state

    def pack(self) -> bytes:
        """As bytes."""
        tiles = [[number, *self._tiles[number].parts()] for number in sorted(self._tiles)]
        return bytes(msgpack.packb([FORMAT, self.since_us, tiles]))

    @property
    def newest_us(self) -> int:
        """When the last version was known."""
        return max((tile.last_us for tile in self._tiles.values()), default=_BEGINNING)

    def rows(self) -> Iterator[EventRow]:
        """All versions that are kept."""
        for tile in self._tiles.values():
            for name, _, versions in tile.events:
                for created_us, seq, event_us, values in versions:
                    yield EventRow(name, event_us, created_us, seq, None if values is None else tuple(values))

    def apply(self, row: EventRow, *, was: int | None = None) -> bool:
        """Take a version of an event in; gives whether that changed anything.

        Args:
            row: the version.
            was: the provisional number that it went by until now, if it did.
        """
        key = value_hash(row.event_id).to_bytes(_ID_BYTES, "little")
        version = [row.created_us, row.seq, row.event_us, None if row.values is None else _plain(row.values)]
        for number, tile in self._tiles.items():
            place = tile.find(key, row.event_id)
            if place is not None:
                return self._correct(number, key, place, _with(tile.events[place], version, was))
        self._place(key, [row.event_id, _known(version), [version]])
        return True

    def values(self, as_of_us: int) -> list[Any] | None:
        """The view's outputs at an instant; none where that is before `since_us`.

        Raises:
            InvalidRequest: a sum of whole numbers is beyond int64.
        """
        if as_of_us < self.since_us:
            return None
        seen = {span: _Seen(*self._gather(as_of_us, as_of_us - span)) for span in self._tiling.spans}
        return [seen[span].answer(column, function) for span, column, function in self._tiling.outputs]

    def expire(self, now_us: int) -> None:
        """Forget what no answer at this instant or later needs."""
        for number, tile in list(self._tiles.items()):
            if tile.last_us + self._tiling.longest_us <= now_us:
                del self._tiles[number]
            elif tile.corrected and tile.last_us <= now_us:
                tile.fill(
                    [[name, known, _newest(versions)] for name, known, versions in tile.events], self._tiling
                )
        self.since_us = max(self.since_us, now_us)

    def _correct(self, number: int, key: bytes, place: int, changed: Event) -> bool:
        tile = self._tiles[number]
        if changed == tile.events[place]:
            return False
        events = list(tile.events)
        if changed[2][-1][2] // self._tiling.width_us == number:
            events[place] = changed
            tile.fill(events, self._tiling)
            return True
        del events[place]
        if events:
            tile.fill(events, self._tiling)
        else:
            del self._tiles[number]
        self._place(key, changed)
        return True

    def _place(self, key: bytes, event: Event) -> None:
        number = event[2][-1][2] // self._tiling.width_us
        self._tiles.setdefault(number, _Tile()).append(key, event, self._tiling)

    def _gather(self, as_of_us: int, edge_us: int) -> tuple[list[Any], list[Version]]:
        """Summaries of whole tiles, and versions of the others, of events after the edge that count at an instant."""
        width = self._tiling.width_us
        summaries, versions = [], []
        for number, tile in self._tiles.items():
            start_us, settled = number * width, tile.last_us <= as_of_us
            if settled and start_us > edge_us:
                summaries.append(tile.summary)
            elif not settled or start_us + width > edge_us:
                versions += tile.counting(as_of_us, edge_us)
        return summaries, versions


class _Seen:
    """What one window sees."""

    def __init__(self, summaries: list[Any], versions: list[Version]) -> None:
        self._summaries = summaries
        self._versions = versions
        self._columns: dict[int, tuple[list[Any], list[Ranked]]] = {}

    def answer(self, column: int | None, function: str) -> Any:
        """One output."""
        if column is None:
            return sum(summary[0] for summary in self._summaries) + len(self._versions)
        if column not in self._columns:
            self._columns[column] = (
                [summary[1][column] for summary in self._summaries],
                list(_ranked(self._versions, column)),
            )
        return answer(function, *self._columns[column])


class _Tile:
    """The events of a stretch of time, packed one after the other, and their summary: a count and a partial a column.

    An event lies in the tile of its last version, and the summary is of last versions.
    """

    def __init__(
        self,
        last_us: int = _BEGINNING,
        corrected: bool = False,
        keys: bytes = b"",
        packed: bytes = b"",
        summary: bytes = b"",
    ) -> None:
        self.last_us = last_us
        """When the last version was known."""
        self.corrected = corrected
        """Whether an event has several versions."""
        self._keys = keys
        self._packed = packed
        self._packed_summary = summary
        self._events: list[Event] | None = None
        self._summary: list[Any] | None = None

    def parts(self) -> tuple[int, bool, bytes, bytes, bytes]:
        """What makes the tile again."""
        if self._summary is not None:
            self._packed_summary = msgpack.packb(self._summary, default=str)
        return self.last_us, self.corrected, self._keys, self._packed, self._packed_summary

    @property
    def events(self) -> list[Event]:
        """In the order of their keys."""
        if self._events is None:
            unpacker = msgpack.Unpacker(max_buffer_size=0)
            unpacker.feed(self._packed)
            self._events = list(unpacker)
        return self._events

    @property
    def summary(self) -> list[Any]:
        """How many events there are, and each column's partial."""
        if self._summary is None:
            self._summary = msgpack.unpackb(self._packed_summary)
        return self._summary

    def find(self, key: bytes, event_id: int | str) -> int | None:
        """The place of an event."""
        at = self._keys.find(key)
        while at >= 0:
            place, rest = divmod(at, _ID_BYTES)
            if rest == 0 and self.events[place][0] == event_id:
                return place
            at = self._keys.find(key, at + 1)
        return None

    def append(self, key: bytes, event: Event, tiling: Tiling) -> None:
        """One more event; the others stay packed."""
        if not self._keys:
            self._summary = [0, [empty() for _ in tiling.functions]]
        if self._events is not None:
            self._events.append(event)
        self._keys += key
        self._packed += msgpack.packb(event)
        self.last_us = max(self.last_us, event[1])
        self.corrected = self.corrected or len(event[2]) > 1
        newest = event[2][-1]
        if newest[3] is not None:
            self.summary[0] += 1
            for column, functions in enumerate(tiling.functions):
                for ranked in _ranked([newest], column):
                    add(self.summary[1][column], ranked, functions)

    def fill(self, events: Iterable[Event], tiling: Tiling) -> None:
        """These events in place of all."""
        self.__init__()  # type: ignore[misc]
        for event in events:
            self.append(value_hash(event[0]).to_bytes(_ID_BYTES, "little"), event, tiling)

    def counting(self, as_of_us: int, edge_us: int) -> list[Version]:
        """Of each event the version that counts at an instant, if it is no tombstone and after the edge."""
        found = []
        for _, _, versions in self.events:
            version = next((one for one in reversed(versions) if _known(one) <= as_of_us), None)
            if version is not None and version[3] is not None and version[2] > edge_us:
                found.append(version)
        return found


def _with(event: Event, version: Version, was: int | None) -> Event:
    """An event with one more version, which may have had another number; those that count at no time any more go."""
    name, known, versions = event
    others = [one for one in versions if one[:2] != [version[0], was]]
    if not any(one[:2] == version[:2] for one in others):
        others.append(version)
    kept: list[Version] = []
    for one in sorted(others, reverse=True):
        if all(_known(one) < _known(later) or not _stays_behind(later, one) for later in kept):
            kept.append(one)
    return [name, max(known, _known(version)), kept[::-1]]


def _stays_behind(later: Version, earlier: Version) -> bool:
    """Whether the order of two versions will be the same when each has its final number."""
    return bool(later[0] > earlier[0] or not later[1] >= PROVISIONAL > earlier[1])


def _newest(versions: list[Version]) -> list[Version]:
    """The last version, and those that may come behind it yet."""
    return [one for one in versions if one is versions[-1] or not _stays_behind(versions[-1], one)]


def _known(version: Version) -> int:
    created_us, _, event_us, _ = version
    return int(max(created_us, event_us))


def _ranked(versions: Iterable[Version], column: int) -> Iterator[Ranked]:
    """Values that are not null, in the order that `last` goes by."""
    for created, seq, happened, values in versions:
        if values[column] is not None:
            yield happened, created, seq, values[column]


def _plain(values: tuple[Any, ...]) -> list[Any]:
    return [value + 0.0 if isinstance(value, float) else value for value in values]
