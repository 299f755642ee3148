"""Announcements of new events: a follower of the ledger reads when there is something to read, not by polling.

On PostgreSQL every append sends a NOTIFY in its own transaction, so it arrives after the commit, on every machine. A
notification can be missed: a connection breaks, or a pooler between passes none on. So a follower still polls, but
rarely while it listens. SQLite has no notifications, and there a poll is a read of a local file.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import sqlalchemy as sa

from cluster.ledger.database import is_shared

CHANNEL = "falaj_ledger"
POLL_S = 0.03
"""Interval of the polls of a follower that does not listen."""
LISTENING_POLL_S = 0.5
"""Interval of the polls of a follower that listens. It is also how long a missed notification can go unnoticed."""
RECONNECT_S = 1.0
_NOTIFY = sa.text(f"NOTIFY {CHANNEL}")
LOG = logging.getLogger("falaj.ledger")


def announce(connection: sa.Connection) -> None:
    """Announce events of this transaction when it commits; on SQLite this does nothing."""
    if is_shared(connection):
        connection.execute(_NOTIFY)


class Announcements:
    """Announcements of one ledger, for one thread.

    Args:
        engine: Engine of the ledger's database.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._can_listen = is_shared(engine)
        self._connection: Any = None
        self._connect_at = 0.0
        self._is_failing = False

    def wait(self, stopped: threading.Event) -> None:
        """Return when the ledger should be read: after an announcement, or after the interval of the polls.

        It returns at once after a new connection, because events before it were not announced to it.
        """
        if not self._can_listen:
            stopped.wait(POLL_S)
            return
        if self._connection is None and self._connect():
            return
        if self._connection is None:
            stopped.wait(POLL_S)
            return
        try:
            for _ in self._connection.notifies(timeout=LISTENING_POLL_S, stop_after=1):
                pass
        except self._errors() as error:
            LOG.warning(
                "the connection for the ledger's announcements broke, so the ledger is polled: %s", error
            )
            self.close()

    @property
    def is_listening(self) -> bool:
        """Whether a connection for announcements is open."""
        return self._connection is not None

    def close(self) -> None:
        """Close the connection; the next `wait` opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*self._errors()):
                connection.close()

    def _connect(self) -> bool:
        """Try to open a connection, at most once in `RECONNECT_S`; return whether it listens."""
        if time.monotonic() < self._connect_at:
            return False
        self._connect_at = time.monotonic() + RECONNECT_S
        try:
            pooled = self._engine.raw_connection()
            connection: Any = pooled.driver_connection
            pooled.detach()
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
        except self._errors() as error:
            if not self._is_failing:  # one line for each outage
                LOG.warning(
                    "the ledger's announcements cannot be received, so the ledger is polled: %s", error
                )
            self._is_failing = True
            return False
        self._connection, self._is_failing = connection, False
        return True

    def _errors(self) -> tuple[type[Exception], ...]:
        return (sa.exc.SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error, OSError)
