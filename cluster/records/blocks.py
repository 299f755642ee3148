"""Blocks: copies of a segment's lines in the ledger's PostgreSQL database, until the segment is uploaded.

With `replica.durability=shared`, a replica adds each group of records as one block before it answers. A block is a
range of bytes of the segment's file, so it is encrypted as the file is. All blocks of a segment in order are the file
or its beginning, and any node can upload a segment whose node is lost.

To seal a segment is to end it: its writer gets `SegmentSealed` and starts another segment. An uploader first seals the
segment and then reads its blocks, so no block can arrive later.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from cluster.errors import FalajError
from cluster.ledger.database import is_shared, timeouts, updating
from cluster.records.database import BLOCKS
from cluster.records.location import LogLocation, local_node

ANSWER_TIMEOUT_S = 9.0
"""Longest wait in seconds for an answer of the database. Then the requests that wait get 503."""
PAUSE_S = 0.2
"""Seconds between two tries."""
_TIMEOUTS = {
    "connect_timeout": "3",
    "tcp_user_timeout": "5000",
    "keepalives_idle": "2",
    "keepalives_interval": "1",
    "keepalives_count": "3",
}
"""Parameters of libpq that end a connection about 5 s after the database's host died or its network was cut."""
SILENT_S = 300.0
"""Seconds after which another node uploads the segments of a node that reports nothing."""
_FIRST = sa.text(
    "INSERT INTO log_blocks (log, segment, start, content, node, sealed) "
    "VALUES (:log, :segment, :start, :content, :node, false) ON CONFLICT DO NOTHING"
)
_NEXT = sa.text(
    "INSERT INTO log_blocks (log, segment, start, content, node, sealed) "
    "SELECT log, segment, :start, :content, node, false FROM log_blocks "
    "WHERE log = :log AND segment = :segment AND start = 0 AND NOT sealed FOR SHARE ON CONFLICT DO NOTHING"
)
_ABANDONED = sa.text(
    "SELECT log, segment FROM log_blocks WHERE start = 0 AND created_at < now() - make_interval(secs => :silent_s) "
    "AND node NOT IN (SELECT node FROM log_progress WHERE log = '' AND node <> :node "
    "AND reported_at >= now() - make_interval(secs => :silent_s)) ORDER BY log, segment"
)


class SegmentSealed(FalajError):
    """Another process ended the segment. Its writer must start a new one."""


class Block(NamedTuple):
    """Consecutive lines of a segment."""

    segment: str
    start: int
    """Offset in the segment's file. The block at 0 begins with the file's first line."""
    content: bytes


class BlockWriter:
    """Adds the blocks of one log, over one connection that stays open.

    Only one thread may use it, but any thread may call `abandon`.
    """

    def __init__(self, location: LogLocation) -> None:
        assert location.engine is not None, "Only a shared log has blocks."
        self._log, self._node = location.name, local_node(str(location.folder.parents[1]))
        self._engine = sa.create_engine(
            location.engine.url,
            poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",  # one statement for each block, so one round trip
            connect_args=timeouts(location.engine.url, **_TIMEOUTS),
        )
        self._connection: sa.Connection | None = None
        self._socket: socket.socket | None = None
        self._is_abandoned = False

    def add(self, blocks: Sequence[Block]) -> None:
        """Add blocks durably, and retry if the connection breaks or cannot be opened: the database may be restarting.

        Idempotent: adding a block twice changes nothing.

        Raises:
            SegmentSealed: A block's segment was sealed.
            DBAPIError: The database does not answer. The blocks may have been added or not.
        """
        deadline = time.monotonic() + ANSWER_TIMEOUT_S - PAUSE_S
        while True:
            try:
                self._add(blocks)
                return
            except sa.exc.DBAPIError as error:
                is_outage = self._connection is None or error.connection_invalidated
                self.close()
                if not is_outage or self._is_abandoned or time.monotonic() + PAUSE_S > deadline:
                    raise
            except BaseException:
                self.close()
                raise
            time.sleep(PAUSE_S)

    def _add(self, blocks: Sequence[Block]) -> None:
        connection = self._connect()
        for block in blocks:
            values = {"log": self._log, "node": self._node, **block._asdict()}
            added = connection.execute(_NEXT if block.start else _FIRST, values).rowcount
            if added == 0 and not self._is_added(connection, block):
                raise SegmentSealed(f"Segment {block.segment} of {self._log} was sealed.")

    def _connect(self) -> sa.Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
            driver = self._connection.connection.driver_connection
            assert driver is not None, "An open connection has one of the driver."
            self._socket = socket.socket(fileno=os.dup(driver.fileno()))
            if self._is_abandoned:  # during the connection's start
                self.abandon()
        return self._connection

    def abandon(self) -> None:
        """End `add` in its thread, which waits for an answer. It fails at once, and must not be called again."""
        self._is_abandoned = True
        if (own := self._socket) is not None:
            with contextlib.suppress(OSError):  # it was closed in the meantime
                own.shutdown(socket.SHUT_RDWR)

    def _is_added(self, connection: sa.Connection, block: Block) -> bool:
        query = sa.select(BLOCKS.c.start).where(*_of(self._log, block.segment), BLOCKS.c.start == block.start)
        return connection.execute(query).first() is not None

    def close(self) -> None:
        """Close the connection. The next `add` opens a new one."""
        connection, self._connection = self._connection, None
        own, self._socket = self._socket, None
        if own is not None:
            own.close()
        if connection is not None:
            with contextlib.suppress(sa.exc.DBAPIError):
                connection.close()


def segment_sizes(engine: sa.Engine, log: str) -> dict[str, int]:
    """Return the segments of a log that have blocks, with the size of all their blocks in bytes."""
    if not is_shared(engine):
        return {}
    size = sa.func.sum(sa.func.length(BLOCKS.c.content))
    query = sa.select(BLOCKS.c.segment, size).where(BLOCKS.c.log == log).group_by(BLOCKS.c.segment)
    with engine.connect() as connection:
        return {segment: int(total) for segment, total in connection.execute(query)}


def read_blocks(engine: sa.Engine, log: str, segment: str) -> bytes:
    """Return the content of a segment's blocks; empty if it has none."""
    if not is_shared(engine):
        return b""
    with engine.connect() as connection:
        return _content(connection, log, segment)


def seal(engine: sa.Engine, log: str, segment: str) -> bytes:
    """Let a segment get no more blocks, and return the content of its blocks; empty if it has none."""
    if not is_shared(engine):
        return b""
    with updating(engine) as connection:
        connection.execute(BLOCKS.update().where(*_of(log, segment), BLOCKS.c.start == 0).values(sealed=True))
        return _content(connection, log, segment)


def remove_blocks(engine: sa.Engine, log: str, segment: str) -> None:
    """Remove the blocks of a segment, after its upload."""
    if is_shared(engine):
        with updating(engine) as connection:
            connection.execute(BLOCKS.delete().where(*_of(log, segment)))


def abandoned_segments(engine: sa.Engine, *, node: str, silent_s: float = SILENT_S) -> list[tuple[str, str]]:
    """Return log and name of old segments whose node reports nothing, and of all old segments of this node.

    This node's own segments are closed and uploaded long before. Those that it still has on its disk must be left out.
    """
    if not is_shared(engine):
        return []
    with engine.connect() as connection:
        rows = connection.execute(_ABANDONED, {"node": node, "silent_s": silent_s}).all()
    return [(row.log, row.segment) for row in rows]


def _of(log: str, segment: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return BLOCKS.c.log == log, BLOCKS.c.segment == segment


def _content(connection: sa.Connection, log: str, segment: str) -> bytes:
    query = sa.select(BLOCKS.c.start, BLOCKS.c.content).where(*_of(log, segment)).order_by(BLOCKS.c.start)
    content = b""
    for start, part in connection.execute(query):
        if start != len(content):  # a block is missing: what follows it cannot be read
            break
        content += bytes(part)
    return content
