"""Which controller acts: one of all nodes.

With PostgreSQL, the controller that acts holds an advisory lock in an open transaction, and uses it each second. If the
process or its machine dies, is stopped, or loses its network, the server ends the idle transaction after `LEASE_S`, and
another controller gets the lock. A lock of a transaction also works through a pooler. With SQLite there is one machine,
and the lock of a file is enough: the kernel releases it with its process.

The lock avoids doubled work and doubled lines in logs. It is not needed for safety: appends are conditional.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.ledger.database import is_shared
from cluster.node.locks import hold_lock

LEASE_S = 5
_KEY = 0x0FA1A9
"""No other lock of the database has this key: those of `cluster.ledger.database` and `cluster.records` are others."""
_TAKEN = "Another controller of rollouts (pid {pid}) runs for {folder}."


class Leadership:
    """The lock of the controller that acts.

    Args:
        engine: Engine of the ledger's database.
        file: File to lock with SQLite.
    """

    def __init__(self, engine: sa.Engine, file: Path) -> None:
        self._engine = engine
        self._file = file
        self._connection: sa.Connection | None = None
        self._held = contextlib.ExitStack()
        self._has_file = False
        self.acts = False
        """Whether the lock was held at the last check. Other threads may read it."""

    def is_held(self) -> bool:
        """Take the lock if it is free, and return whether this process has it. Call it each second.

        Raises:
            SQLAlchemyError: The database does not answer. Then the lock is lost.
        """
        self.acts = False  # also if the check fails
        self.acts = self._holds_transaction() if is_shared(self._engine) else self._holds_file()
        return self.acts

    def release(self) -> None:
        """Release the lock, so that another controller acts at once."""
        self.acts = False
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sa.exc.SQLAlchemyError):
                connection.rollback()
            connection.close()
        self._held.close()
        self._has_file = False

    def _holds_transaction(self) -> bool:
        try:
            if self._connection is not None:
                self._connection.execute(sa.text("SELECT 1"))
                return True
            connection = self._connection = self._engine.connect()
            connection.execute(
                sa.text("SELECT set_config('idle_in_transaction_session_timeout', :lease, true)"),
                {"lease": f"{LEASE_S}s"},
            )
            if connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(_KEY))).scalar_one():
                return True
        except sa.exc.SQLAlchemyError:
            self.release()
            raise
        self.release()
        return False

    def _holds_file(self) -> bool:
        if not self._has_file:
            try:
                self._held.enter_context(hold_lock(self._file, _TAKEN))
            except ConfigError:
                return False
            self._has_file = True
        return True
