"""What makes a batch the same batch: the source's content, and the parts of the view that its stored rows depend on.

Ingesting the same content twice does nothing, also after a change of owner, purposes, time-to-live or any other part
that says nothing about rows. After a change that does, a new column for one, the same content is another batch: its
rows are stored once more, under the same keys and times, and take the place of the earlier ones everywhere, because of
equal times the greatest `ingest_seq` counts. So the way to fill a new column for old rows, or to go back to an earlier
transform, is to ingest the old files again; training sets that were pinned to earlier table versions do not see it.
Where a change moves the rows' times (a zone, a lag), the earlier rows would stay visible: they are mended (`mending`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from feature_jobs.store.definitions.views import content_hash
from feature_jobs.store.ingestion.ranges import TimeRange, chunks

_NOT_OF_ROWS = frozenset(
    {"ttl_s", "owner", "purposes", "region", "retention_s", "subject_key", "entities", "aggregations"}
)
_NOT_OF_COLUMNS = frozenset({"description", "categorical"})
_OF_SOURCE = frozenset(
    {"event_timestamp", "created_timestamp", "deleted", "query", "columns", "nulls", "zone"}
)


def row_version(definition: Mapping[str, Any]) -> str:
    """Content hash of the parts of a view's definition that stored rows depend on."""
    parts = {key: value for key, value in definition.items() if key not in _NOT_OF_ROWS}
    parts["schema"] = [
        {key: value for key, value in field.items() if key not in _NOT_OF_COLUMNS}
        for field in definition["schema"]
    ]
    parts["source"] = {key: value for key, value in definition["source"].items() if key in _OF_SOURCE}
    return content_hash(parts)


def _times(definition: Mapping[str, Any]) -> list[Any]:
    """What decides under which times a row is stored; a transform may too, but then nobody can say."""
    source = definition["source"]
    names = ("event_timestamp", "created_timestamp", "zone")
    return [definition.get("created_lag_s"), *(source.get(name) for name in names)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A batch that is to be stored."""

    ingest_id: str
    """16 hex digits."""
    range: TimeRange | None = None
    """Of event times; none is all of the source."""


class Ingested:
    """What a view has of some content.

    Args:
        definition: of the view as it is now.
        digest: of the source's content.
        batches: payloads of `BatchIngested` and `BatchMended` in order; older releases gave batches other ids.
        definitions: by view and version, as they were applied.
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        digest: str,
        *,
        batches: Iterable[Mapping[str, Any]],
        definitions: Mapping[tuple[str, str], Mapping[str, Any]],
    ) -> None:
        name, rows = definition["name"], row_version(definition)
        self._parts = [name, rows, digest]
        self._whole = False
        self._ranges: list[TimeRange] = []
        self.earlier: dict[str, bool] = {}
        """The batches that hold this content by id, and whether each is of the whole source."""
        self._moved: dict[str, bool] = {}
        for batch in batches:
            if batch["view"] == name and batch["source_digest"] == digest:
                made_with = definitions.get((name, batch["view_version"]))
                self._take(batch, alike=made_with is not None and row_version(made_with) == rows)
                moved = made_with is not None and _times(made_with) != _times(definition)
                if "mend_id" in batch:
                    self._moved[batch["batch"]] = moved
                elif batch.get("rows_in", 1):
                    self.earlier[batch["ingest_id"]] = batch.get("start") is None
                    self._moved[batch["ingest_id"]] = moved

    def _take(self, batch: Mapping[str, Any], *, alike: bool) -> None:
        if not alike:  # its rows have taken the place of those before
            self._whole, self._ranges = False, []
            self._parts = [*self._parts[:3], batch.get("mend_id") or batch["ingest_id"]]
        elif batch.get("start") is None:
            self._whole = True
        else:
            start, end = (dt.datetime.fromisoformat(batch[name]) for name in ("start", "end"))
            self._ranges.append(TimeRange(start, end))

    def missing(self, range: TimeRange | None = None, span: dt.timedelta | None = None) -> list[Wanted]:
        """The batches that are still to be stored, in order.

        Args:
            range: of event times; none is all of the source.
            span: length of a batch's range.
        """
        if self._whole:
            return []
        if range is None:
            return [Wanted(ingest_id=self._id())]
        return [
            Wanted(ingest_id=self._id(str(chunk)), range=chunk) for chunk in chunks(range, span, self._ranges)
        ]

    @property
    def moved(self) -> bool:
        """Whether rows of a batch are stored under times that the definition no longer gives them."""
        return any(self._moved.values())

    @property
    def in_parts(self) -> bool:
        """Whether a batch holds a part of the source by time; such a batch cannot be mended."""
        return not all(self.earlier.values())

    def whole(self) -> Wanted:
        """All of the source as one batch, also where it is stored already."""
        return Wanted(ingest_id=self._id())

    def _id(self, *more: str) -> str:
        return hashlib.sha256(":".join([*self._parts, *more]).encode()).hexdigest()[:16]
