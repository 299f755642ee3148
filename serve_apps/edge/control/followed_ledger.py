"""What the edge needs of the ledger, read in a thread, so that the edge never waits for the database.

The database can be on another machine, and a cut network can delay one read for many seconds. The edge then keeps its
last state, and everything else of it continues.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

import sqlalchemy as sa

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.ledger.announcements import Announcements
from serve_apps.edge.control.own_limits import read_own_limits
from serve_apps.edge.haproxy.request_limits import OwnLimits
from serve_apps.rollout.serving_state import States, apply, read_states

LOG = logging.getLogger("falaj.edge")
STOP_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerState:
    """The ledger's events up to `seq`, as far as they concern the edge."""

    states: States = field(default_factory=dict)
    own_limits: OwnLimits = field(default_factory=OwnLimits)
    seq: int = 0


class FollowedLedger:
    """Follows a ledger from the start of a thread on."""

    def __init__(self, ledger: Ledger) -> None:
        self.value = LedgerState()
        """The newest state that was read."""
        self.is_read = False
        """Whether the ledger was read at least once."""
        self.error: Exception | None = None
        """Why the newest events cannot be applied: this release is too old for them, or the thread has failed."""
        self.has_ended = False
        """Whether the thread has failed."""
        self._is_failing = False
        self._ledger = ledger
        self._announcements = Announcements(ledger.engine)
        self._tried = threading.Event()
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="ledger", daemon=True)

    def start(self) -> None:
        """Start the thread; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def wait_for_first(self, timeout_s: float) -> None:
        """Wait until the ledger was read once, or could not be read."""
        self._tried.wait(timeout_s)

    def wait_for_change(self, timeout_s: float) -> None:
        """Wait until `value` has changed since the last call."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def _follow(self) -> None:
        try:
            while not self._stopped.is_set():
                self._read()
                self._tried.set()
                self._announcements.wait(self._stopped)
        except Exception as error:  # noqa: BLE001 (the edge raises it in its own thread)
            self.error, self.has_ended = error, True
        finally:
            self._tried.set()
            self._changed.set()
            self._announcements.close()

    def _read(self) -> None:
        """Read the new events; if the database fails, the last state stays."""
        try:
            head = self._ledger.head()
            if head != self.value.seq:
                self._apply_new(head)
                self._changed.set()
            self.is_read, self.error, self._is_failing = True, None, False
        except FalajError as error:
            self.error = error
        except sa.exc.SQLAlchemyError as error:
            if not self._is_failing:  # one line for each outage
                LOG.warning("the ledger cannot be read, so the last state stays: %s", error)
            self._is_failing = True

    def _apply_new(self, head: int) -> None:
        state = self._stored(head) if self.value.seq == 0 else self.value
        states, own_limits, seq = state.states, state.own_limits, state.seq
        for entry in self._ledger.entries(after=seq):
            event = entry.event()
            states = apply(states, event, time=entry.time)
            own_limits = own_limits.apply(event)
            seq = entry.seq
        self.value = LedgerState(states=states, own_limits=own_limits, seq=seq)

    def _stored(self, head: int) -> LedgerState:
        """Return the states of the ledger's events up to `head` at once, instead of all these events.

        The states may contain newer events already. Applying these again changes nothing.
        """
        try:
            states, own_limits = read_states(self._ledger), read_own_limits(self._ledger)
        except sa.exc.DBAPIError as error:
            LOG.warning("the ledger cannot be written, so all its events are read: %s", error)
            return LedgerState()
        return LedgerState(states=states, own_limits=own_limits, seq=head)
