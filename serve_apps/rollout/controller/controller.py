"""One pass over all rollouts with a policy: read the counts, get the verdict, append what follows from it.

All events of a pass are appended in one transaction, and only if the model's rollout has not changed since it was read.
So a second controller, a command at the same moment, or a kill at any point leaves the ledger in a state that the next
pass continues from.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import sqlalchemy as sa

from cluster.errors import first_line
from cluster.ledger import Entry, Ledger
from cluster.ledger.events import PolicyEnded, RolloutPromoted, RolloutRolledBack
from cluster.statistics.planning import Plan
from serve_apps.rollout import transitions
from serve_apps.rollout.assignment import is_watch, watch_id
from serve_apps.rollout.capacity.scaling import StepScaling
from serve_apps.rollout.controller.clock import LookClock, database_time
from serve_apps.rollout.controller.decisions import Look, events_after, next_step, rests_on_time
from serve_apps.rollout.controller.steady_state import SteadyState
from serve_apps.rollout.controller.summary import Summaries
from serve_apps.rollout.controller.watching import WatchedModel
from serve_apps.rollout.evidence.store import Counting
from serve_apps.rollout.history import History, PolicyRun, read_running
from serve_apps.rollout.json_form import from_json
from serve_apps.rollout.looks import EvidenceSource, decision_now, watch_decision_now
from serve_apps.rollout.serving_state import ModelState, Rollout, read_states
from serve_apps.rollout.transitions import ACTOR
from serve_apps.rollout.warm import due

CONFIRMING_LOOKS = 5
"""A deadline, a lack of data, or the end of a watch counts after so many looks in a row. A clock may be wrong for a
moment."""
LOG = logging.getLogger("falaj.rollouts")


class Controller:
    """The controller of one cluster's rollouts.

    Args:
        ledger: The ledger.
        source: Where the counts come from.
        refusal: Returns why a principal may not roll out a model's version, or "" if it may.
        scaling: Scales a version before it gets more units. None: nothing is scaled.
        clock: Gives the time of each look; by default, the database's.
        steady: What monitoring says about the versions. None ignores it.
    """

    def __init__(
        self,
        ledger: Ledger,
        source: EvidenceSource,
        *,
        refusal: Callable[[dict[str, Any], str, int], str],
        scaling: StepScaling | None = None,
        clock: LookClock | None = None,
        steady: SteadyState | None = None,
    ) -> None:
        self._ledger = ledger
        self._source = source
        self._refusal = refusal
        self._scaling = scaling
        self._clock = clock or LookClock(partial(database_time, ledger.engine))
        self._steady = steady
        self._summaries = Summaries(ledger, source)
        self._plans: dict[str, Plan] = {}
        self._late_looks: dict[str, int] = {}
        """For each rollout, watch or removal, how many looks in a row found something that rests on time."""
        self._ended: set[str] = set()
        """Rollouts and watches that have ended, and whose counts are not all removed."""
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
        self._follow_monitoring()
        since = self._ledger.head()
        histories = read_running(self._ledger)
        states = read_states(self._ledger) if histories else {}
        failed = 0
        for model, history in histories.items():
            try:
                self._judge(model, history, states.get(model, ModelState()), now=now, since=since)
            except Exception as error:  # any failure of one rollout: it must not stop the others
                if isinstance(error, sa.exc.SQLAlchemyError) and not isinstance(error, sa.exc.DataError):
                    raise
                failed += 1
                LOG.error("the rollout of '%s' could not be judged: %s", model, first_line(error))
        self._forget_ended()
        return failed

    def _judge(
        self, model: str, history: History, state: ModelState, *, now: dt.datetime, since: int
    ) -> None:
        """Look at a model's running rollout, or at its promotion; then remove versions that nobody needs any more."""
        if history.run is not None and state.rollout is not None:
            self._check(model, history, history.run, state.rollout, now=now, since=since)
        elif history.watch is not None:
            self._watch(WatchedModel(model, history, history.watch, state), now=now, since=since)
        removed = due(model, history, state, now)
        if self._is_confirmed(f"removal of {model}", is_late=bool(removed)) and removed:
            transitions.append(self._ledger, model, removed, actor=ACTOR, since=since)

    def _follow_monitoring(self) -> None:
        """Read new monitoring results. Odd results of another release must not stop the guardrails."""
        if self._steady is None:
            return
        try:
            self._steady.check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            LOG.error("monitoring results could not be judged: %s", first_line(error))

    def _forget_ended(self) -> None:
        """Forget rollouts and watches that have ended, by a verdict or by a command, also while no controller ran.

        Each look removes a part of the rows of one rollout, so that it takes no longer than others. An older release
        ends a rollout without `PolicyEnded`.
        """
        until = self._ledger.head()  # before the queries: an event between them is found again
        kinds = (PolicyEnded, RolloutRolledBack, RolloutPromoted)
        found = [entry for kind in kinds for entry in self._ledger.entries(kind, after=self._ended_until)]
        for entry in found:
            self._summarise(entry)
        self._ended |= {str(entry.payload["rollout"]) for entry in found} | self._ended_watches(found)
        self._ended_until = until
        for rollout in sorted(self._ended):
            self._plans.pop(rollout, None)
            self._late_looks.pop(rollout, None)
            if self._source.forget(rollout):
                return
            self._ended.remove(rollout)

    def _summarise(self, entry: Entry) -> None:
        """Append the summary of a rollout that has ended. A rollout that cannot be summarised stops no other."""
        if entry.type != PolicyEnded.__name__:
            return
        try:
            self._summaries.append(entry, actor=ACTOR)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            LOG.error("rollout %s has no summary: %s", entry.payload["rollout"], first_line(error))

    def _ended_watches(self, ended: Iterable[Entry]) -> set[str]:
        """Return the ids of watches that are over, or that can never begin. Some end without an event of their own.

        Args:
            ended: New ends of rollouts. The first look of a controller has all of them, so it finds each watch whose
                removal another controller has begun.
        """
        found = {one for one in self._source.counted() if is_watch(one)}
        found |= {
            watch_id(entry.payload["rollout"]) for entry in ended if entry.type == RolloutPromoted.__name__
        }
        if not found:
            return found
        histories = read_running(self._ledger)  # after the query: what was registered until then is in it
        return found - {watch_id(rollout) for history in histories.values() for rollout in _judged(history)}

    def _watch(self, watched: WatchedModel, *, now: dt.datetime, since: int) -> None:
        watch = watched.watch
        plan = self._plan(watch.run)
        if watch.holdback:
            self._register_watch(watch.run, plan, is_new=watch.last is None)
        is_over = now >= watch.until
        if not self._is_confirmed(watch_id(watch.run.rollout), is_late=is_over):
            return
        if is_over:
            events = watched.end()
        else:
            evidence, decision = watch_decision_now(self._source, watch, plan, now=now)
            events = watched.events_after(evidence, decision)
        if events and transitions.append(self._ledger, watched.model, events, actor=ACTOR, since=since):
            LOG.info("promotion of '%s': %s", watched.model, ", ".join(one.type for one in events))

    def _register_watch(self, run: PolicyRun, plan: Plan, *, is_new: bool) -> None:
        """Let the edges count the units of a holdback. After its first decision, it is missing only if it was lost."""
        self._source.ensure_registered(watch_id(run.rollout), _counting(run, plan), is_new=is_new)

    def _check(
        self,
        model: str,
        history: History,
        run: PolicyRun,
        rollout: Rollout,
        *,
        now: dt.datetime,
        since: int,
    ) -> None:
        plan = self._plan(run)
        self._source.ensure_registered(run.rollout, _counting(run, plan))
        if plan.policy.holdback:  # before the promotion, whoever promotes
            self._register_watch(run, plan, is_new=True)
        versions = [version for version in (history.champion, run.version) if version is not None]
        signals = () if self._steady is None else self._steady.signals(model, versions)
        evidence, decision = decision_now(self._source, run, plan, now=now, signals=signals)
        if not self._is_confirmed(run.rollout, is_late=rests_on_time(decision)):
            return
        look = Look(
            model=model,
            champion=history.champion,
            rollout=rollout,
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

    def _is_confirmed(self, of: str, *, is_late: bool) -> bool:
        """Return whether enough looks in a row found something that rests on time, if this look did."""
        if not is_late:
            self._late_looks.pop(of, None)
            return True
        looks = self._late_looks[of] = self._late_looks.get(of, 0) + 1
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


def _judged(history: History) -> Iterator[str]:
    """Yield the rollouts of a model that are judged, before or after their promotion."""
    if history.run is not None:
        yield history.run.rollout
    if history.watch is not None:
        yield history.watch.run.rollout


def _counting(run: PolicyRun, plan: Plan) -> Counting:
    return Counting(slow_ms=run.slow_ms, max_units=plan.policy.max_units)
