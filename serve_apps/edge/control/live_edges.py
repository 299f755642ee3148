"""The edges of an installation, and what each has applied, as a table in the ledger's database.

Every edge reports when it has applied something, and once a second. Commands wait for every live edge by this table,
and each edge takes its share of the limits by the number of live edges. Reports are no events: they say how things are
now, and the next one replaces them. All times are the database's, so a wrong clock of an edge does not matter.

Only PostgreSQL has the table. With SQLite there is one machine and one edge, whose state file says the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from cluster.ledger import Ledger
from cluster.ledger.database import is_shared
from serve_apps.edge.control.edge_state import EdgeState
from serve_apps.edge.control.files import replace_file

HEARTBEAT_S = 1.0
LIVE_S = 5.0
"""An edge counts as live for this long after its last report."""
FORGET_S = 86_400.0
"""A silent edge is named in warnings for this long."""
STOP_S = 3.0
LOG = logging.getLogger("falaj.edge")

METADATA = sa.MetaData()
EDGES = sa.Table(
    "edges",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("address", sa.String(300), nullable=False),
    sa.Column("applied_seq", sa.BigInteger, nullable=False),
    sa.Column("backends", sa.Text, nullable=False, server_default="[]"),
    sa.Column("refused", sa.Text, nullable=False),
    sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
)
_NOW = sa.func.clock_timestamp()
_AGE_S = sa.extract("epoch", _NOW - EDGES.c.reported_at)
_OTHER = EDGES.alias("other")
_NUM_OTHERS = (
    sa.select(sa.func.count())
    .select_from(_OTHER)
    .where(_OTHER.c.id != sa.bindparam("own_id"))
    .where(sa.extract("epoch", _NOW - _OTHER.c.reported_at) < LIVE_S)
    .scalar_subquery()
)

_NO_FLUSH = sa.func.set_config("synchronous_commit", "off", True)
"""Lets the statement's own transaction commit without waiting for the disk: a lost report is repeated. It is no `SET`,
which a pooler would pass on to the next user of the connection, for example to an append to the ledger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedEdge:
    """The last report of one edge."""

    id: str
    address: str
    """Its URL and host name, for messages."""
    applied_seq: int
    refused: str
    age_s: float
    """Seconds since the report."""
    has_app: bool = True
    """Whether it has the application that was asked for."""

    @property
    def is_live(self) -> bool:
        """Whether the edge reported within `LIVE_S`."""
        return self.age_s < LIVE_S


def read_edges(connection: sa.Connection, *, app: str | None = None) -> list[ReportedEdge]:
    """Return the edges that reported within a day.

    Args:
        connection: a connection to the ledger's database.
        app: an application; each edge says whether it has it.
    """
    columns = [EDGES.c.id, EDGES.c.address, EDGES.c.applied_seq, EDGES.c.refused, _AGE_S.label("age_s")]
    query = sa.select(*columns, *([] if app is None else [EDGES.c.backends])).where(_AGE_S < FORGET_S)
    return [
        ReportedEdge(
            id=row.id,
            address=row.address,
            applied_seq=row.applied_seq,
            refused=row.refused,
            age_s=float(row.age_s),
            has_app=app is None or app in json.loads(row.backends),
        )
        for row in connection.execute(query.order_by(EDGES.c.address))
    ]


def ensure_table(ledger: Ledger) -> None:
    """Create the table if it does not exist."""
    if not sa.inspect(ledger.engine).has_table(EDGES.name):
        with ledger.writing() as connection:
            METADATA.create_all(connection)


def edge_id(folder: Path) -> str:
    """Return the id of the edge with this folder, created at first use; later controllers of the edge have the same."""
    path = folder / "edge.id"
    try:
        stored = path.read_text().strip()
    except FileNotFoundError:
        stored = ""
    if stored:
        return stored
    new = secrets.token_hex(8)
    with contextlib.suppress(OSError):  # the disk is full; then this controller alone has the id
        replace_file(path, new.encode())
    return new


def _read_count(file: Path) -> int:
    """Return the number of edges that an earlier controller stored; 1 if there is none."""
    try:
        return max(1, int(file.read_text()))
    except (FileNotFoundError, ValueError):
        return 1


class EdgeReporter:
    """Reports one edge's state in a thread, so that the edge never waits for the database.

    Args:
        ledger: the ledger with the table.
        edge: id of the edge.
        address: its URL and host name.
        count_file: file with the number of live edges, for the next controller of this edge.
    """

    def __init__(self, ledger: Ledger, *, edge: str, address: str, count_file: Path) -> None:
        self.num_edges = _read_count(count_file)
        """Number of live edges, this one included. After an outage it does not fall before `LIVE_S`."""
        self._count_file = count_file
        self._reported_at = self._reporting_since = -math.inf
        self._tried = threading.Event()
        self._ledger = ledger
        self._edge = edge
        self._address = address
        self._state: EdgeState | None = None
        self._written_backends: list[str] | None = None
        self._connection: sa.Connection | None = None
        self._is_failing = False
        self._due = threading.Event()
        self._stopped = threading.Event()
        self._remove = False
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def report(self, state: EdgeState) -> None:
        """Report a state soon, in place of any that was not reported yet."""
        if not is_shared(self._ledger.engine):
            return
        self._state = state
        self._due.set()
        if self._thread.ident is None:
            self._thread.start()

    def wait_for_first(self, timeout_s: float) -> None:
        """Wait until the first report was written, or could not be written."""
        if self._thread.ident is not None:
            self._tried.wait(timeout_s)

    def stop(self, *, remove: bool) -> None:
        """End the reports.

        Args:
            remove: whether the edge stops, so that no command waits for it and the others take its share of the limits.
        """
        self._remove = remove
        self._stopped.set()
        self._due.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._due.wait(HEARTBEAT_S)
            self._due.clear()
            if self._state is not None and not self._stopped.is_set():
                self._try_report(self._state)
                self._tried.set()
        if self._remove:
            self._try_remove()
        self._close()

    def _try_report(self, state: EdgeState) -> None:
        """Write a report; if the database fails, the next one is tried after a heartbeat."""
        try:
            self._write(state)
        except Exception as error:  # noqa: BLE001 (without this thread, no command would wait for the edge again)
            self._close()
            if not self._is_failing:
                LOG.warning(
                    "the edge's state cannot be reported, so commands will not wait for it: %s", error
                )
            self._is_failing = True
        else:
            self._is_failing = False

    def _write(self, state: EdgeState) -> None:
        values = {
            "id": self._edge,
            "address": self._address,
            "applied_seq": state.applied_seq,
            "refused": state.refused,
            "reported_at": _NOW,
        }
        if state.backends != self._written_backends:  # a long text, which changes rarely
            values["backends"] = json.dumps(state.backends)
        changes = {name: value for name, value in values.items() if name != "id"}
        statement = (
            insert(EDGES)
            .values(values)
            .on_conflict_do_update(index_elements=[EDGES.c.id], set_=changes)
            .returning(_NUM_OTHERS, _NO_FLUSH)
        )
        others = self._connect().execute(statement, {"own_id": self._edge}).one()[0]
        self._written_backends = list(state.backends)
        self._update_count(1 + int(others))

    def _update_count(self, num_edges: int) -> None:
        """Use a smaller count only when all others had the time to report since this edge's last outage.

        After an outage of the database no edge counts as live, and the first one to report would take all of a limit.
        """
        now = time.monotonic()
        if self._is_failing or now - self._reported_at > LIVE_S:
            self._reporting_since = now
        self._reported_at = now
        if num_edges > self.num_edges or (
            num_edges < self.num_edges and now - self._reporting_since >= LIVE_S
        ):
            self.num_edges = num_edges
            # If the disk is full, the next controller starts with the old count.
            with contextlib.suppress(OSError):
                replace_file(self._count_file, str(num_edges).encode())

    def _try_remove(self) -> None:
        try:
            self._connect().execute(EDGES.delete().where(EDGES.c.id == self._edge))
        except sa.exc.SQLAlchemyError as error:
            LOG.warning(
                "the edge cannot be removed from the live edges; it counts as one for a while: %s", error
            )

    def _connect(self) -> sa.Connection:
        """Return this thread's own connection."""
        if self._connection is None:
            ensure_table(self._ledger)
            connection = self._ledger.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._connection, self._written_backends = connection, None
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                connection.close()
