"""One look at a rollout: read the counts, and get their verdict. `action=show` reads the counts of the last look."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Protocol

from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.verdict import Decision, judge
from serve_apps.rollout.evidence.store import Counting
from serve_apps.rollout.history import PolicyRun, step_at


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

    def ensure_registered(self, rollout_id: str, counting: Counting) -> None:
        """Let the edges count the units of a rollout if they do not, for example after `evidence.db` was lost."""

    def forget(self, rollout_id: str) -> bool:
        """Remove counts of a rollout that has ended. Return whether it must be called again. Idempotent."""


def decision_now(
    source: Counts, run: PolicyRun, plan: Plan, *, now: dt.datetime
) -> tuple[Evidence, Decision]:
    """Return the counts of a rollout, and what they decide."""
    evidence = evidence_now(source, run, plan, now=now)
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


def _counted_plan(plan: Plan, step: int, weight: float) -> Plan:
    """Return the plan with the weight that units are counted at, if it is not the step's.

    Above 50 %, the arms have no equal size, so their units are not counted, and nothing is promoted.
    """
    steps = list(plan.policy.steps)
    if steps[step].weight == weight or not 0 < weight <= 50:
        return plan
    steps[step] = replace(steps[step], weight=weight)
    return replace(plan, policy=replace(plan.policy, steps=tuple(steps)))
