"""The logs' two tables in the ledger's database: blocks of segments that are not uploaded yet, and nodes' progress.

They are not projections: no event contains a record. They are used only if the storage root is remote. No transaction
takes the ledger's lock.
"""

from __future__ import annotations

import sqlalchemy as sa

from cluster.ledger import Ledger

_METADATA = sa.MetaData()
BLOCKS = sa.Table(
    "log_blocks",
    _METADATA,
    sa.Column("log", sa.String(256), primary_key=True),
    sa.Column("segment", sa.String(64), primary_key=True),
    sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),  # offset in the segment's file
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("node", sa.String(128), nullable=False),
    sa.Column("sealed", sa.Boolean, nullable=False, default=False),  # counts in a segment's first block only
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
)
PROGRESS = sa.Table(
    "log_progress",
    _METADATA,
    sa.Column("node", sa.String(128), primary_key=True),
    sa.Column("log", sa.String(256), primary_key=True),  # empty: all logs without a row of their own
    sa.Column("complete_until", sa.String(32), nullable=False),  # ISO 8601, by the node's clock
    sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
)


def ensure_tables(ledger: Ledger) -> None:
    """Create the tables if they do not exist."""
    with ledger.engine.connect() as connection:
        if sa.inspect(connection).has_table(PROGRESS.name):
            return
    with ledger.writing() as connection:  # the lock: PostgreSQL fails if two processes create a table at once
        _METADATA.create_all(connection)
