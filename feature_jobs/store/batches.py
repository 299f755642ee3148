"""What makes a batch the same batch: the source's content, and the parts of the view that its stored rows depend on.

Ingesting the same content twice does nothing, also after a change of owner, purposes, time-to-live or any other part
that says nothing about rows. After a change that does, a new column for one, the same content is another batch: its
rows are stored once more, under the same keys and times, and take the place of the earlier ones everywhere, because of
equal times the greatest `ingest_seq` counts. So the way to fill a new column for old rows, or to go back to an earlier
transform, is to ingest the old files again; training sets that were pinned to earlier table versions do not see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from feature_jobs.store.definitions import content_hash

_NOT_OF_ROWS = frozenset(
    {"ttl_s", "owner", "purposes", "region", "retention_s", "subject_key", "entities", "aggregations"}
)
_NOT_OF_COLUMNS = frozenset({"description", "categorical"})
_OF_SOURCE = frozenset({"event_timestamp", "created_timestamp", "deleted", "query"})


def row_version(definition: Mapping[str, Any]) -> str:
    """Content hash of the parts of a view's definition that stored rows depend on."""
    parts = {key: value for key, value in definition.items() if key not in _NOT_OF_ROWS}
    parts["schema"] = [
        {key: value for key, value in field.items() if key not in _NOT_OF_COLUMNS}
        for field in definition["schema"]
    ]
    parts["source"] = {key: value for key, value in definition["source"].items() if key in _OF_SOURCE}
    return content_hash(parts)


def next_batch(
    definition: Mapping[str, Any],
    digest: str,
    *,
    batches: Iterable[Mapping[str, Any]],
    definitions: Mapping[tuple[str, str], Mapping[str, Any]],
) -> str | None:
    """The id of the batch that a view would make of some content, 16 hex digits; none where it has it already.

    Args:
        definition: of the view as it is now.
        digest: of the source's content.
        batches: payloads of `BatchIngested` in order; older releases gave batches other ids.
        definitions: by view and version, as they were applied.
    """
    name, rows = definition["name"], row_version(definition)
    parts = [name, rows, digest]
    same_content = [one for one in batches if one["view"] == name and one["source_digest"] == digest]
    if same_content:
        last = same_content[-1]
        made_with = definitions.get((name, last["view_version"]))
        if made_with is not None and row_version(made_with) == rows:
            return None
        parts.append(last["ingest_id"])
    return hashlib.sha256(":".join(parts).encode()).hexdigest()[:16]
