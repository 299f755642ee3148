"""Find out which batches of a source's content are stored already, and which are missing.

A batch is identified by the source's content and by those parts of the view that its stored rows depend on. Ingesting
the same content twice does nothing, also after a change of owner, purposes, time-to-live or any other part that rows do
not depend on.

After a change that rows do depend on (for example a new column), the same content is a new batch. Its rows are stored
once more, under the same keys and times. Readers get them instead of the earlier rows, because at equal times the
greatest `ingest_seq` is used. So to fill a new column for old rows, or to go back to an earlier transform, ingest the
old files again. Training sets that are pinned to earlier table versions do not contain the new rows.

If a change (of the zone or `created_lag`) moves the rows' times, the earlier rows would stay visible. So they are
mended instead (`store/offline/mending.py`).
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from feature_jobs.store.definitions.views import content_hash
from feature_jobs.store.ingestion.ranges import TimeRange, chunks

_PARTS_WITHOUT_EFFECT_ON_ROWS = frozenset(
    {"ttl_s", "owner", "purposes", "region", "retention_s", "subject_key", "entities", "aggregations"}
)
_FIELD_PARTS_WITHOUT_EFFECT_ON_ROWS = frozenset({"description", "categorical"})
_SOURCE_PARTS_OF_ROWS = frozenset(
    {"event_timestamp", "created_timestamp", "deleted", "query", "columns", "nulls", "zone"}
)


def row_version(definition: Mapping[str, Any]) -> str:
    """Return the content hash of those parts of a view's definition that stored rows depend on."""
    parts = {key: value for key, value in definition.items() if key not in _PARTS_WITHOUT_EFFECT_ON_ROWS}
    parts["schema"] = [
        {key: value for key, value in field.items() if key not in _FIELD_PARTS_WITHOUT_EFFECT_ON_ROWS}
        for field in definition["schema"]
    ]
    parts["source"] = {
        key: value for key, value in definition["source"].items() if key in _SOURCE_PARTS_OF_ROWS
    }
    return content_hash(parts)


def _time_settings(definition: Mapping[str, Any]) -> list[Any]:
    """Return the settings that decide a row's stored times. A transform may change times too; that is not detected."""
    source = definition["source"]
    names = ("event_timestamp", "created_timestamp", "zone")
    return [definition.get("created_lag_s"), *(source.get(name) for name in names)]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """A batch that will be stored."""

    ingest_id: str
    """16 hex digits."""
    event_range: TimeRange | None = None
    """Only rows with an event time in this range; None is the whole source."""


class BatchHistory:
    """The batches of a view that contain the content of one source.

    Args:
        definition: the view's current definition.
        digest: digest of the source's content.
        batches: payloads of `BatchIngested` and `BatchMended`, in order. Batches of older releases have ids of another
            form.
        definitions: applied definitions by view and version.
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
        self._id_parts = [name, rows, digest]
        self._is_whole_stored = False
        self._stored_ranges: list[TimeRange] = []
        self.stored: dict[str, bool] = {}
        """Id of each batch with this content, to whether it contains the whole source."""
        self._has_moved: dict[str, bool] = {}
        for batch in batches:
            if batch["view"] != name or batch["source_digest"] != digest:
                continue
            previous = definitions.get((name, batch["view_version"]))
            self._add(batch, same_rows=previous is not None and row_version(previous) == rows)
            moved = previous is not None and _time_settings(previous) != _time_settings(definition)
            if "mend_id" in batch:
                self._has_moved[batch["batch"]] = moved
            elif batch.get("rows_in", 1):
                self.stored[batch["ingest_id"]] = batch.get("start") is None
                self._has_moved[batch["ingest_id"]] = moved

    def _add(self, batch: Mapping[str, Any], *, same_rows: bool) -> None:
        if not same_rows:  # the rows of this batch have replaced the rows of earlier batches
            self._is_whole_stored, self._stored_ranges = False, []
            self._id_parts = [*self._id_parts[:3], batch.get("mend_id") or batch["ingest_id"]]
        elif batch.get("start") is None:
            self._is_whole_stored = True
        else:
            start, end = (dt.datetime.fromisoformat(batch[name]) for name in ("start", "end"))
            self._stored_ranges.append(TimeRange(start, end))

    def missing(
        self, event_range: TimeRange | None = None, span: dt.timedelta | None = None
    ) -> list[PlannedBatch]:
        """Return the batches that are still to be stored, in order.

        Args:
            event_range: range of event times; None is the whole source.
            span: length of each batch's range.
        """
        if self._is_whole_stored:
            return []
        if event_range is None:
            return [self.whole()]
        return [
            PlannedBatch(ingest_id=self._ingest_id(str(chunk)), event_range=chunk)
            for chunk in chunks(event_range, span, self._stored_ranges)
        ]

    @property
    def has_moved_rows(self) -> bool:
        """True if stored rows have other times than the current definition gives them."""
        return any(self._has_moved.values())

    @property
    def has_partial_batch(self) -> bool:
        """True if a batch contains only a time range of the source. Such a batch cannot be mended."""
        return not all(self.stored.values())

    def whole(self) -> PlannedBatch:
        """Return the whole source as one batch, even if it is stored already."""
        return PlannedBatch(ingest_id=self._ingest_id())

    def _ingest_id(self, *more: str) -> str:
        return hashlib.sha256(":".join([*self._id_parts, *more]).encode()).hexdigest()[:16]
