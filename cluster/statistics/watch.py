"""The verdict about a version after its promotion.

With a holdback, a part of the units keeps the predecessor. An equal part of the others is compared with it, by the same
tests as before the promotion, and in windows that the plan has reserved. Without a holdback nothing can be compared.
Then only the breaker rolls back: a version whose last requests all failed.

The plan divides the errors before the rollout begins. So all looks before and after the promotion share them.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cluster.statistics.breaker import all_failed
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.policy import DAY_S
from cluster.statistics.verdict import Decision, Verdict, describe_failures, find_blocks, find_harm


def judge_watch(plan: Plan, evidence: Evidence) -> Decision:
    """Return the verdict: `roll_back`, `hold` (nothing can be compared now), or `continue`."""
    if not plan.policy.holdback:
        if all_failed(evidence.last):
            return Decision(verdict=Verdict.roll_back, reasons=(describe_failures(evidence.last),))
        return Decision(verdict=Verdict.advance)
    if harm := find_harm(plan, evidence):
        return Decision(verdict=Verdict.roll_back, reasons=harm)
    blocks, _ = find_blocks(plan, evidence)
    return Decision(verdict=Verdict.hold if blocks else Verdict.advance, reasons=tuple(blocks))


def windows_before(plan: Plan, *, rollout_s: float) -> int:
    """Return how many windows a rollout has used until its promotion.

    Args:
        plan: The plan.
        rollout_s: Time from the start of the rollout to its promotion, in seconds.
    """
    return len(plan.policy.steps) + max(0, math.floor(rollout_s / DAY_S))


def watch_plan(plan: Plan, *, weight: float, used: int) -> Plan:
    """Return the plan by which units are counted after the promotion: one step, and the windows that are left.

    The last window never ends. If the promotion was so late that none is left, the last one goes on.

    Args:
        plan: The rollout's plan.
        weight: Percent of the units that a holdback keeps.
        used: What `windows_before` returned.
    """
    step = replace(plan.policy.steps[0], weight=weight, bake_s=0.0)
    return replace(
        plan,
        policy=replace(plan.policy, steps=(step,)),
        steps=(replace(plan.steps[0], weight=weight),),
        num_windows=max(1, plan.num_windows - used),
    )


def in_plan(plan: Plan, evidence: Evidence, *, used: int) -> Evidence:
    """Return counts after the promotion with the number that their window has in the rollout's plan."""
    return replace(evidence, window=min(used + evidence.window, plan.num_windows - 1))
