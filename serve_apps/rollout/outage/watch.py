"""Looks for harm while the ledger does not answer, in a thread of its own, because a call to a database can hang.

The loop of the controller tells when a look begins and ends. If none has ended for `OUTAGE_S`, this thread judges the
rollouts that are known: by the counts in the machine's own file if there is one (SQLite), and by the last requests in
the edge's own access files. A guardrail or the breaker writes a rollback to the journal. Nothing else acts: no step,
no promotion, no deadline.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
import uuid
from collections.abc import Callable

from cluster.errors import ConfigError, first_line
from cluster.ledger import Ledger
from cluster.ledger.store import utc_now
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.verdict import find_harm
from serve_apps.rollout.history import read_running
from serve_apps.rollout.json_form import as_json, from_json
from serve_apps.rollout.looks import Counts, evidence_now
from serve_apps.rollout.outage.journal import Journal, JournaledRollback
from serve_apps.rollout.outage.known import KnownRollout, KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.settling import settle

OUTAGE_S = 3.0
"""Seconds without a complete look after which the ledger counts as down."""
EVERY_S = 1.0
LOG = logging.getLogger("falaj.rollouts")


class OutageWatch:
    """The watch of one machine.

    Args:
        journal: The machine's journal.
        known: The rollouts that ran when the ledger answered last.
        local: What the machine's edge has recorded.
        clock: Returns the time, in UTC.
    """

    def __init__(
        self,
        journal: Journal,
        known: KnownRollouts,
        local: LocalEvidence,
        *,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        self._journal = journal
        self._known = known
        self._local = local
        self._clock = clock
        self._store: Counts | None = None
        self._answered_at = time.monotonic()
        self._is_down = False
        self._is_unusable = False
        """Whether the journal could not be read or written the last time."""
        self._written: set[str] = set()
        """Rollouts that were rolled back. After the journal was emptied, `known` still has them for a moment."""

    def use(self, store: Counts | None) -> None:
        """Take the counts that do not depend on the ledger's database; None if there are none."""
        self._store = store

    def begin_look(self, ledger: Ledger, *, actor: str) -> None:
        """Append what the journal has, and learn which rollouts run. Call it before each look.

        Raises:
            SQLAlchemyError: The ledger does not answer.
            ReleaseTooOld: A newer release wrote an event that changes what is served.
        """
        self._use_journal(lambda: settle(ledger, self._journal, actor=actor))
        self._known.learn(read_running(ledger))

    def _use_journal(self, use: Callable[[], object]) -> None:
        """Call a function. The first of several failures of the journal is logged; none stops a look at the ledger."""
        try:
            use()
        except (ConfigError, OSError) as error:
            if not self._is_unusable:
                LOG.error(
                    "without its journal, no rollout is rolled back in an outage of the ledger: %s", error
                )
            self._is_unusable = True
        else:
            self._is_unusable = False

    def end_look(self) -> None:
        """Call it after each complete look: the ledger answers."""
        self._answered_at = time.monotonic()

    def run(self, stopped: threading.Event, on_checked: Callable[[int], object]) -> None:
        """Check each second until `stopped` is set. No failure ends it.

        Args:
            stopped: Ends the loop.
            on_checked: Gets the number of rollbacks in the journal after each check.
        """
        while not stopped.wait(EVERY_S):
            try:
                self.check_once()
                self._use_journal(lambda: on_checked(len(self._journal.read())))
            except Exception as error:  # noqa: BLE001 (without this thread, nothing would roll back in an outage)
                LOG.warning("rollouts cannot be judged without the ledger: %s", first_line(error))

    def check_once(self) -> int:
        """If the ledger is down, judge the known rollouts, and return how many rollbacks were written.

        Raises:
            ConfigError, OSError: The journal cannot be written, or the access files cannot be read.
        """
        if not self._is_outage():
            return 0
        self._local.read()
        self._written |= {rollback.rollout for rollback in self._journal.read()}
        written = 0
        for one in self._known.rollouts:
            if one.run.rollout in self._written or (rollback := self._judge(one)) is None:
                continue
            self._journal.append(rollback)
            self._written.add(rollback.rollout)
            LOG.error("rollout %s is rolled back without the ledger: %s", rollback.rollout, rollback.reasons)
            written += 1
        return written

    def _is_outage(self) -> bool:
        is_down = time.monotonic() - self._answered_at > OUTAGE_S
        if is_down and not self._is_down:
            LOG.warning("the ledger does not answer; only a rollback for safety is possible")
            self._local.forget()
        self._is_down = is_down
        return is_down

    def _judge(self, one: KnownRollout) -> JournaledRollback | None:
        plan = from_json(Plan, one.run.plan)
        for source in (self._store, self._local):
            if source is None:
                continue
            try:
                evidence = evidence_now(source, one.run, plan, now=self._clock())
            except Exception as error:  # noqa: BLE001 (the other source may still work)
                LOG.warning("the counts of rollout %s cannot be read: %s", one.run.rollout, first_line(error))
                continue
            if harm := find_harm(plan, evidence):
                return self._rollback(one, evidence, list(harm))
        return None

    def _rollback(self, one: KnownRollout, evidence: Evidence, reasons: list[str]) -> JournaledRollback:
        return JournaledRollback(
            id=uuid.uuid4().hex,
            model=one.model,
            rollout=one.run.rollout,
            version=one.run.version,
            fallback=one.champion,
            reasons=reasons,
            evidence=as_json(evidence),
            decided_at=self._clock().isoformat(timespec="microseconds"),
        )
