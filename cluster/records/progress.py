"""Up to which time a log is complete, as the nodes report it.

Each node's uploader reports for all its logs until when their records are shared: uploaded, or in the ledger's
database. Until the earliest of these times, a reader on any node sees every record. Later records of another node may
still be on its disk only.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cluster.ledger.database import is_shared, updating
from cluster.records.database import PROGRESS
from cluster.records.location import AnyLog, local_node, location_of
from cluster.records.table import FOLDER

_REPORT_LOCK = 0x0FA1A8
BEGINNING = dt.datetime.fromtimestamp(0, dt.UTC)
"""Until then a log is complete that has records on a disk which cannot be shared yet."""
ALL_LOGS = ""
"""Stands for all logs of a node that have no row of their own: the node has no record of them that is not shared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogAge:
    """How complete a log is."""

    kind: str
    """`predictions` or `outcomes`."""
    until: dt.datetime
    """Every record that was written until then is read. By the clock of the node that is furthest behind."""
    nodes: tuple[str, ...] = ()
    """Nodes that reported. Without any, only this machine has written to the log."""
    last: str = ""
    """The node that is furthest behind, if it is another one."""

    def __str__(self) -> str:
        number = max(1, len(self.nodes))
        nodes = "1 node" if number == 1 else f"{number} nodes, the last is {self.last or 'this one'}"
        return f"{self.kind} until {self.until:%Y-%m-%d %H:%M:%S} UTC ({nodes})"


def ages_as_json(ages: Iterable[LogAge]) -> dict[str, Any]:
    """Return ages as plain values by the log's kind, for a result."""
    return {
        age.kind: {"until": age.until.isoformat(timespec="seconds"), "nodes": list(age.nodes)} for age in ages
    }


def log_age(log: AnyLog) -> LogAge:
    """Return up to which time a log is complete. Call it before the log is read."""
    location, now = location_of(log), dt.datetime.now(dt.UTC)
    if location.engine is None:
        return LogAge(kind=location.kind, until=now)
    query = sa.select(PROGRESS.c.node, PROGRESS.c.log, PROGRESS.c.complete_until).where(
        PROGRESS.c.log.in_((ALL_LOGS, location.name))
    )
    until: dict[str, dt.datetime] = {}
    with location.engine.connect() as connection:
        # A log's own row, which sorts after that of all logs, replaces it.
        for node, _, time in connection.execute(query.order_by(PROGRESS.c.node, PROGRESS.c.log)):
            until[node] = dt.datetime.fromisoformat(time)
    this_node = local_node(str(location.folder.parents[1]))
    # What this machine has, it reads from its disk; but a table of an older release only after its adoption.
    counted = {node: time for node, time in until.items() if node != this_node}
    if (location.folder / FOLDER).exists():
        counted[this_node] = until.get(this_node, BEGINNING)
    last = min(counted, key=counted.__getitem__, default="")
    return LogAge(
        kind=location.kind,
        until=min([now, *counted.values()]),
        nodes=tuple(sorted({this_node, *until})),
        last="" if last == this_node else last,
    )


def report(
    engine: sa.Engine, node: str, *, until: dt.datetime, logs: Mapping[str, dt.datetime] | None = None
) -> None:
    """Replace what a node reported.

    Args:
        engine: The ledger's database.
        node: Name of the node.
        until: Time until which all records of all other logs are shared.
        logs: Time by log, for logs with records on the node's disk that are not shared.
    """
    if not is_shared(engine):  # there is no other node that reads it
        return
    rows = {ALL_LOGS: until} | dict(logs or {})
    with updating(engine) as connection:
        # Two uploaders of a node may report at the same time. The later one replaces what the earlier one reported.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_REPORT_LOCK)))
        connection.execute(PROGRESS.delete().where(PROGRESS.c.node == node))
        connection.execute(
            PROGRESS.insert(),
            [
                {"node": node, "log": log, "complete_until": time.isoformat()}
                for log, time in sorted(rows.items())
            ],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeProgress:
    """What a node reported."""

    node: str
    until: dict[str, str]
    """Time by log, until which all records are shared. The empty log stands for all others."""
    silent_s: float
    """Seconds since the report."""

    def is_complete(self, until: dt.datetime) -> bool:
        """Return whether the node has shared all records that were written before a time."""
        return all(dt.datetime.fromisoformat(time) >= until for time in self.until.values())


def read_progress(engine: sa.Engine) -> list[NodeProgress]:
    """Return what all nodes reported, sorted by node."""
    if not is_shared(engine):
        return []
    seconds = sa.extract("epoch", sa.func.now() - PROGRESS.c.reported_at)
    by_node: dict[str, NodeProgress] = {}
    with engine.connect() as connection:
        query = sa.select(PROGRESS, seconds.label("silent_s")).order_by(PROGRESS.c.node, PROGRESS.c.log)
        for row in connection.execute(query):
            progress = NodeProgress(node=row.node, until={}, silent_s=float(row.silent_s))
            by_node.setdefault(row.node, progress).until[row.log] = row.complete_until
    return list(by_node.values())


def forget(engine: sa.Engine, node: str) -> None:
    """Remove what a node reported, because it has left, or is lost with its disk."""
    with updating(engine) as connection:
        connection.execute(PROGRESS.delete().where(PROGRESS.c.node == node))
