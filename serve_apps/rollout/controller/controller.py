"""One pass over all rollouts with a policy: read the counts, get the verdict, append what follows from it.

All events of a pass are appended in one transaction, and only if the model's rollout has not changed since it was read.
So a second controller, a command at the same moment, or a kill at any point leaves the ledger in a state that the next
pass continues from.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import sqlalchemy as sa

from cluster.errors import first_line
from cluster.ledger import Ledger
from cluster.ledger.events import PolicyEnded, RolloutPromoted, RolloutRolledBack
from cluster.statistics.planning import Plan
from cluster.statistics.verdict import Decision
from serve_apps.rollout import transitions
from serve_apps.rollout.capacity.scaling import StepScaling
from serve_apps.rollout.controller.clock import LookClock, database_time
from serve_apps.rollout.controller.decisions import Look, events_after, next_step, rests_on_time
from serve_apps.rollout.evidence.store import Counting
from serve_apps.rollout.history import History, PolicyRun, read_running
from serve_apps.rollout.json_form import from_json
from serve_apps.rollout.looks import EvidenceSource, decision_now

ACTOR = "system:rollouts"
CONFIRMING_LOOKS = 5
"""A deadline, or a lack of data, counts after so many looks in a row. A clock may be wrong for a moment."""
LOG = logging.getLogger("falaj.rollouts")


class Controller:
    """The controller of one cluster's rollouts.

    Args:
        ledger: The ledger.
        source: Where the counts come from.
        refusal: Returns why a principal may not roll out a model's version, or "" if it may.
        scaling: Scales a version before it gets more units. None: nothing is scaled.
        clock: Gives the time of each look; by default, the database's.
    """

    def __init__(
        self,
        ledger: Ledger,
        source: EvidenceSource,
        *,
        refusal: Callable[[dict[str, Any], str, int], str],
        scaling: StepScaling | None = None,
        clock: LookClock | None = None,
    ) -> None:
        self._ledger = ledger
        self._source = source
        self._refusal = refusal
        self._scaling = scaling
        self._clock = clock or LookClock(partial(database_time, ledger.engine))
        self._plans: dict[str, Plan] = {}
        self._late_looks: dict[str, int] = {}
        """For each rollout, how many looks in a row had a decision that rests on time."""
        self._ended: set[str] = set()
        """Rollouts that have ended, and whose counts are not all removed."""
        self._ended_until = 0

    @property
    def ledger(self) -> Ledger:
        """The ledger that it reads and appends to."""
        return self._ledger

    def check_once(self) -> int:
        """Look at every rollout with a policy once. A failure of one does not stop the others.

        Returns:
            Number of rollouts that could not be judged.

        Raises:
            SQLAlchemyError: The ledger does not answer. A value that it cannot store is a failure of one rollout.
            ReleaseTooOld: A newer release wrote an event that changes what is served.
        """
        now = self._clock.now()
        if now is None:
            LOG.warning("the clock has jumped since the last look, so this look is skipped")
            self._late_looks.clear()
            return 0
        since = self._ledger.head()
        failed = 0
        for model, history in read_running(self._ledger).items():
            if history.run is None:
                continue
            try:
                self._check(model, history, history.run, now=now, since=since)
            except Exception as error:  # any failure of one rollout: it must not stop the others
                if isinstance(error, sa.exc.SQLAlchemyError) and not isinstance(error, sa.exc.DataError):
                    raise
                failed += 1
                LOG.error(
                    "rollout %s of '%s' could not be judged: %s",
                    history.run.rollout,
                    model,
                    first_line(error),
                )
        self._forget_ended()
        return failed

    def _forget_ended(self) -> None:
        """Forget rollouts that have ended, by a verdict or by a command, also while no controller ran.

        Each look removes a part of the rows of one rollout, so that it takes no longer than others. An older release
        ends a rollout without `PolicyEnded`.
        """
        until = self._ledger.head()  # before the queries: an event between them is found again
        kinds = (PolicyEnded, RolloutRolledBack, RolloutPromoted)
        found = (entry for kind in kinds for entry in self._ledger.entries(kind, after=self._ended_until))
        self._ended |= {str(entry.payload["rollout"]) for entry in found}
        self._ended_until = until
        for rollout in sorted(self._ended):
            self._plans.pop(rollout, None)
            self._late_looks.pop(rollout, None)
            if self._source.forget(rollout):
                return
            self._ended.remove(rollout)

    def _check(self, model: str, history: History, run: PolicyRun, *, now: dt.datetime, since: int) -> None:
        plan = self._plan(run)
        counting = Counting(slow_ms=run.slow_ms, max_units=plan.policy.max_units)
        self._source.ensure_registered(run.rollout, counting)
        evidence, decision = decision_now(self._source, run, plan, now=now)
        if not self._is_confirmed(run.rollout, decision):
            return
        look = Look(
            model=model,
            champion=history.champion,
            run=run,
            plan=plan,
            evidence=evidence,
            decision=decision,
        )
        events = events_after(look, refusal=lambda: self._obstacle(look))
        if not events:
            return
        if transitions.append(self._ledger, model, events, actor=ACTOR, since=since) is None:
            LOG.info("the rollout of '%s' changed meanwhile; it is judged again", model)
            return
        LOG.info(
            "rollout %s of '%s': %s%s",
            run.rollout,
            model,
            look.decision.verdict,
            "".join(f"; {reason}" for reason in look.decision.reasons),
        )

    def _is_confirmed(self, rollout: str, decision: Decision) -> bool:
        """Return whether enough looks in a row had such a decision, if it rests on time."""
        if not rests_on_time(decision):
            self._late_looks.pop(rollout, None)
            return True
        looks = self._late_looks[rollout] = self._late_looks.get(rollout, 0) + 1
        return looks >= CONFIRMING_LOOKS

    def _obstacle(self, look: Look) -> str:
        """Return why a step or a promotion cannot be done now, or ""."""
        refusal = self._refusal(look.run.starter, look.model, look.run.version)
        if refusal or self._scaling is None:
            return refusal
        return self._scaling.not_ready(next_step(look))

    def _plan(self, run: PolicyRun) -> Plan:
        if run.rollout not in self._plans:
            self._plans[run.rollout] = from_json(Plan, run.plan)
        return self._plans[run.rollout]
