"""One look at a rollout, or at a promotion: read the counts, and get their verdict. `show` reads the last look."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Protocol

from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.verdict import Decision, judge
from cluster.statistics.watch import in_plan, judge_watch, watch_plan, windows_before
from serve_apps.rollout.assignment import HOLDBACK_WEIGHT, watch_id
from serve_apps.rollout.evidence.store import Counting
from serve_apps.rollout.history import PolicyRun, WatchRun, step_at


class Counts(Protocol):
    """Where the counts come from."""

    def evidence(
        self,
        rollout_id: str,
        plan: Plan,
        *,
        step: int,
        step_started_at: dt.datetime,
        started_at: dt.datetime,
        now: dt.datetime,
    ) -> Evidence:
        """Return the counts of a rollout at one moment."""


class EvidenceSource(Counts, Protocol):
    """Where all edges store their counts."""

    def ensure_registered(self, rollout_id: str, counting: Counting, *, is_new: bool = False) -> None:
        """Let the edges count the units of a rollout if they do not: it is new, or `evidence.db` was lost."""

    def requests(self, rollout_id: str) -> dict[str, int]:
        """Return the number of a rollout's requests by arm."""

    def counted(self) -> set[str]:
        """Return the ids of the rollouts whose units are counted."""

    def forget(self, rollout_id: str) -> bool:
        """Remove counts of a rollout that has ended. Return whether it must be called again. Idempotent."""


def decision_now(
    source: Counts,
    run: PolicyRun,
    plan: Plan,
    *,
    now: dt.datetime,
    signals: tuple[str, ...] = (),
) -> tuple[Evidence, Decision]:
    """Return the counts of a rollout, and what they decide.

    Args:
        source: Where the counts come from.
        run, plan: The rollout and its plan.
        now: Time of the look.
        signals: Further signals, such as a drift. They hold the rollout.
    """
    evidence = evidence_now(source, run, plan, now=now)
    evidence = replace(evidence, signals=(*evidence.signals, *signals))
    return evidence, judge(plan, evidence)


def evidence_now(source: Counts, run: PolicyRun, plan: Plan, *, now: dt.datetime) -> Evidence:
    """Return the counts of a rollout."""
    step = step_at([one.weight for one in plan.policy.steps], run.weight)
    return source.evidence(
        run.rollout,
        _counted_plan(plan, step, run.weight),
        step=step,
        step_started_at=dt.datetime.fromisoformat(run.step_started_at),
        started_at=dt.datetime.fromisoformat(run.started_at),
        now=now,
    )


def last_decision(last: Evidence | None, run: PolicyRun, plan: Plan) -> Decision:
    """Return what the counts of the controller's last look decide. Before the first look at a step, nothing is counted.

    Args:
        last: The counts of the last look.
        run: The rollout.
        plan: Its plan.
    """
    step = step_at([one.weight for one in plan.policy.steps], run.weight)
    if last is None or last.step != step:
        last = Evidence(step=step, window=step, step_s=0.0, total_s=0.0)
    return judge(plan, last)


def watch_decision_now(
    source: EvidenceSource, watch: WatchRun, plan: Plan, *, now: dt.datetime
) -> tuple[Evidence, Decision]:
    """Return the counts since a promotion, and what they decide."""
    promoted_at = dt.datetime.fromisoformat(watch.started_at)
    rollout_s = (promoted_at - dt.datetime.fromisoformat(watch.run.started_at)).total_seconds()
    used = windows_before(plan, rollout_s=rollout_s)
    evidence = source.evidence(
        watch_id(watch.run.rollout),
        watch_plan(plan, weight=HOLDBACK_WEIGHT, used=used),
        step=0,
        step_started_at=promoted_at,
        started_at=promoted_at,
        now=now,
    )
    evidence = in_plan(plan, evidence, used=used)
    return evidence, judge_watch(plan, evidence)


def _counted_plan(plan: Plan, step: int, weight: float) -> Plan:
    """Return the plan with the weight that units are counted at, if it is not the step's.

    Above 50 %, the arms have no equal size, so their units are not counted, and nothing is promoted.
    """
    steps = list(plan.policy.steps)
    if steps[step].weight == weight or not 0 < weight <= 50:
        return plan
    steps[step] = replace(steps[step], weight=weight)
    return replace(plan, policy=replace(plan.policy, steps=tuple(steps)))
