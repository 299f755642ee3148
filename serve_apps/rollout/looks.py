"""One look at a rollout: read the counts, and get their verdict. The controller and `action=show` do the same."""

from __future__ import annotations

import datetime as dt
from typing import Protocol

from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.verdict import Decision, judge
from serve_apps.rollout.history import PolicyRun


class EvidenceSource(Protocol):
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

    def ensure_registered(self, rollout_id: str, *, slow_ms: float | None) -> None:
        """Let the edges count the units of a rollout if they do not, for example after `evidence.db` was lost."""

    def forget(self, rollout_id: str) -> None:
        """Remove the counts of a rollout that has ended. Idempotent."""


def step_of(plan: Plan, weight: float) -> int:
    """Return the position of the step with this weight.

    Raises:
        ValueError: no step has it.
    """
    weights = [step.weight for step in plan.policy.steps]
    try:
        return weights.index(weight)
    except ValueError:
        raise ValueError(
            f"weight {weight:g} is none of the policy's {', '.join(f'{one:g}' for one in weights)}"
        ) from None


def decision_now(
    source: EvidenceSource, run: PolicyRun, plan: Plan, *, now: dt.datetime
) -> tuple[Evidence, Decision]:
    """Return the counts of a rollout, and what they decide.

    Raises:
        ValueError: The rollout's weight is none of the policy's.
    """
    evidence = source.evidence(
        run.rollout,
        plan,
        step=step_of(plan, run.weight),
        step_started_at=dt.datetime.fromisoformat(run.step_started_at),
        started_at=dt.datetime.fromisoformat(run.started_at),
        now=now,
    )
    return evidence, judge(plan, evidence)
