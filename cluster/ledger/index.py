"""The event index: finds events by values of their payload, such as all batches of a view.

`KEYS` says which values of which event types are indexed. The index stores a short hash of the values with the event's
`seq`. The transaction that appends an event also updates the index. An older release appends events without the index;
the next lookup adds these events. The hash chain does not cover the index, because it can be rebuilt from the events.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cluster.ledger.chain import Entry
from cluster.ledger.database import EVENTS, METADATA, POSITIONS

NAME = "event_index_5"
"""Name of the table and of its position. A release that changes `KEYS` must change the number in this name, because two
releases can share one ledger."""

INDEX = sa.Table(
    NAME,
    METADATA,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column(
        "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False
    ),
    sqlite_with_rowid=False,
)


@dataclass(frozen=True, slots=True)
class Key:
    """Fields of a payload by which events are found."""

    fields: tuple[str, ...]
    having: str = ""
    """If set, this key finds only events in which this field is not empty."""

    def values(self, payload: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the values of an event, or None if this key does not find the event."""
        if (self.having and not payload.get(self.having)) or not payload.keys() >= set(self.fields):
            return None
        return {name: payload[name] for name in self.fields}


KEYS: dict[str, tuple[Key, ...]] = {
    "AliasMoved": (Key(("name",)), Key(("name", "alias"))),
    "BatchIngested": (
        Key(("view",)),
        Key(("view", "source_digest")),
        Key(("ingest_id",)),
        Key(("view",), having="profile"),
        Key(("view",), having="source_columns"),
    ),
    "BatchMended": (Key(("view", "source_digest")), Key(("view", "table_version"))),
    "DeploymentRemoved": (Key(("name", "version")),),
    "FeatureServiceApplied": (Key(("service",)),),
    "FeatureTableRewritten": (Key(("view", "table_version")),),
    "FeatureViewApplied": (Key(("view",)),),
    "FeatureViewStateChanged": (Key(("view",)),),
    "JobFinished": (Key(()), Key(("job",))),
    "JobStarted": (Key(("job",)),),
    "JobStopped": (Key(("job",)),),
    "JobSubmitted": (Key(()), Key(("job",)), Key(("submitter",))),
    "ModelDeployed": (Key(("name", "version")),),
    "ModelEvaluated": (Key(("name", "version")),),
    "ModelMonitored": (Key(("model", "version")),),
    "ModelRegistered": (Key(("name",)),),
    "ModelReinstated": (Key(("name", "version")),),
    "ModelReproduced": (Key(("name", "version")),),
    "ModelRetired": (Key(("name", "version")),),
    "OutcomesCompacted": (Key(("model", "table_version")),),
    "PipelineCancelled": (Key(("run",)),),
    "PipelineFinished": (Key(("run",)),),
    "PipelineStarted": (Key(("pipeline",)), Key(("run",))),
    "PredictionsCompacted": (Key(("model", "table_version")),),
    "QuarantineReplayed": (Key(("replay_id",)),),
    "RowsRemoved": (Key(("view", "table_version")),),
    "RunFinished": (Key(("model", "run")),),
    "RunStarted": (Key(("model", "run")), Key(("run",))),
    "ScheduleApplied": (Key(("schedule",)),),
    "ScheduleStateChanged": (Key(("schedule",)),),
    "ScheduledRunDue": (
        Key(("schedule",)),
        Key(("schedule",), having="position"),
        Key(("schedule", "slot")),
    ),
    "ScheduledRunFinished": (Key(("schedule",)), Key(("schedule", "slot"))),
    "ScheduledRunSkipped": (Key(("schedule",)), Key(("schedule",), having="position")),
    "ScheduledRunStarted": (Key(("schedule", "slot")),),
    "ScoringFinished": (Key(("run",)),),
    "ScoringStarted": (Key(("run",)),),
    "ShadowStarted": (Key(("model",)),),
    "ShadowStopped": (Key(("model",)),),
    "StageFinished": (Key(("run",)), Key(("pipeline", "stage"))),
    "StageStarted": (Key(("run",)), Key(("pipeline", "stage"))),
    "SweepFinished": (Key(("model", "run")),),
    "SweepStarted": (Key(("model", "run")),),
    "TrainingSetBuilt": (Key(("row_hash",)),),
    "TrainingSetNotReproducible": (Key(("training_set",)), Key(("training_set", "view"))),
    "TrialFinished": (Key(("model", "run")),),
    "TrialReported": (Key(("model", "run")),),
    "TrialStarted": (Key(("model", "run")),),
    "ViewMaterialized": (Key(("view",)),),
}
"""The keys of each indexed event type."""

_ADVANCE = (
    POSITIONS.update()
    .where(POSITIONS.c.name == NAME, POSITIONS.c.seq == sa.bindparam("previous"))
    .values(seq=sa.bindparam("reached"))
)


def start(connection: sa.Connection) -> None:
    """Start an empty index. If the ledger already has events, the first lookup adds them."""
    connection.execute(POSITIONS.delete().where(POSITIONS.c.name == NAME))
    connection.execute(POSITIONS.insert().values(name=NAME, seq=0))


def is_indexed(type_name: str) -> bool:
    """Return whether events of a type are in the index."""
    return type_name in KEYS


def add_appended(connection: sa.Connection, entry: Entry) -> None:
    """Add an entry in the transaction that appends it. If earlier events are not in the index yet, do nothing."""
    advanced = connection.execute(_ADVANCE, {"previous": entry.seq - 1, "reached": entry.seq})
    if advanced.rowcount == 1:
        add(connection, [entry])


def add(connection: sa.Connection, entries: Sequence[Entry]) -> None:
    """Add entries to the index."""
    rows = [{"key": key, "seq": entry.seq} for entry in entries for key in _keys(entry)]
    if rows:
        connection.execute(INDEX.insert(), rows)


def _keys(entry: Entry) -> Iterator[str]:
    for key in KEYS.get(entry.type, ()):
        values = key.values(entry.payload)
        if values is not None:
            yield _digest(entry.type, key.having, values)


def lookup_key(type_name: str, having: str, values: Mapping[str, Any]) -> str:
    """Return the hash under which the index stores these values.

    Raises:
        KeyError: `KEYS` has no such key, so a lookup would find nothing.
    """
    declared = KEYS.get(type_name, ())
    if not any(set(key.fields) == values.keys() and key.having == having for key in declared):
        raise KeyError(f"Events {type_name} are not indexed by {', '.join(values)}. Add the key to KEYS.")
    return _digest(type_name, having, values)


def _digest(type_name: str, having: str, values: Mapping[str, Any]) -> str:
    text = json.dumps([type_name, having, sorted(values.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def page(key: str, *, beyond: int | None, newest_first: bool, limit: int) -> sa.Select[Any]:
    """Return the query for the next events of a key: after the `seq` `beyond`, or before it with `newest_first`."""
    query = sa.select(EVENTS).join(INDEX, INDEX.c.seq == EVENTS.c.seq).where(INDEX.c.key == key)
    if beyond is not None:
        query = query.where(INDEX.c.seq < beyond if newest_first else INDEX.c.seq > beyond)
    return query.order_by(INDEX.c.seq.desc() if newest_first else INDEX.c.seq).limit(limit)
