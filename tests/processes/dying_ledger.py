"""A ledger whose process is killed with SIGKILL at one point of an append."""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import LedgerEvent


class Point(enum.Enum):
    """Where the process is killed during a look."""

    before_counts = enum.auto()
    in_transaction = enum.auto()
    before_commit = enum.auto()
    after_commit = enum.auto()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingLedger(Ledger):
    """A ledger whose process is killed during an append."""

    point: Point | None = None

    def append_unless_changed(
        self,
        events: Sequence[LedgerEvent],
        *,
        actor: str,
        since: int,
        types: Callable[[str], bool],
        concerns: Callable[[Entry], bool],
    ) -> list[Entry] | None:
        """Append, and die before, during or after it."""
        if self.point is Point.before_commit:
            sa.event.listen(self.engine, "commit", die)
        if self.point is Point.in_transaction:
            sa.event.listen(self.engine, "after_cursor_execute", die_after_an_insert)
        entries = super().append_unless_changed(
            events, actor=actor, since=since, types=types, concerns=concerns
        )
        if self.point is Point.after_commit:
            die()
        return entries


def die_after_an_insert(_connection: object, _cursor: object, statement: str, *_: Any) -> None:
    if statement.startswith("INSERT INTO events"):
        die()
