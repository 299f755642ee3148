"""The verdict of a rollout: a pure function of its plan and its counts. The same counts always give the same verdict.

The first verdict that ends a rollout is final. Safety comes first: the breaker or a guardrail rolls back, whatever else
is known. Then comes promotion, which needs that nothing is missing. Then come the deadline, what blocks (mismatch,
too many units, signals, no data), and the next step.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from cluster.statistics.breaker import LastRequests, is_open
from cluster.statistics.coin import is_harm, log_evidence_of_harm
from cluster.statistics.comparisons import is_reached, is_worse
from cluster.statistics.evidence import EventCounts, Evidence, MetricCounts
from cluster.statistics.no_harm import bound_of_failing_share, is_no_harm
from cluster.statistics.planning import Plan, num_arms
from cluster.statistics.policy import Action, Goal, Policy
from cluster.statistics.sample_ratio import is_mismatch
from cluster.statistics.sequences import MIN_UNITS
from cluster.statistics.signals import difference, shares_above_limits, signals_out_of_bounds


class Verdict(enum.StrEnum):
    """What the controller does next."""

    promote = "promote"
    """Make the treatment the champion."""
    passed = "passed"
    """The shadow showed what the policy asks for. It ends, and only another rollout can promote its version."""
    advance = "continue"
    """Go on: with the next step if `Decision.missing` is empty, else with this one."""
    hold = "hold"
    """Stay at this step, because something blocks."""
    roll_back = "roll_back"
    inconclusive = "inconclusive"
    """The deadline is over and something is missing. It never promotes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A verdict with its reasons in words."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """What is missing for the next step, or for the promotion."""


def judge(plan: Plan, evidence: Evidence) -> Decision:
    """Return the verdict for these counts."""
    policy = plan.policy
    if harm := find_harm(plan, evidence):
        return Decision(verdict=Verdict.roll_back, reasons=harm)
    blocks, actions = find_blocks(plan, evidence)
    missing = _missing(plan, evidence) + tuple(blocks)
    if Action.roll_back in actions:
        return Decision(verdict=Verdict.roll_back, reasons=tuple(blocks), missing=missing)
    is_last = evidence.step == len(policy.steps) - 1
    if is_last and not missing:
        end = Verdict.passed if policy.is_shadow else Verdict.promote
        return Decision(verdict=end, reasons=("all goals are reached, and no harm was found",))
    late = evidence.total_s >= policy.deadline_s
    if late and policy.on_deadline is not Action.warn:
        reasons = (f"deadline: {evidence.total_s / 3600:.1f} h are over", *blocks)
        end = Verdict.roll_back if policy.on_deadline is Action.roll_back else Verdict.inconclusive
        return Decision(verdict=end, reasons=reasons, missing=missing)
    if Action.hold in actions:
        return Decision(verdict=Verdict.hold, reasons=tuple(blocks), missing=missing)
    warnings = (*blocks, *(("deadline is over",) if late else ()))
    if not is_last:  # a block with the action `warn` stops only the promotion
        missing = missing[: len(missing) - len(blocks)]
    return Decision(verdict=Verdict.advance, reasons=warnings, missing=missing)


def find_harm(plan: Plan, evidence: Evidence) -> tuple[str, ...]:
    """Return what rolls back at once: the breaker and the guardrails."""
    found = shares_above_limits(plan, evidence) if plan.policy.is_shadow else _harm_by_events(plan, evidence)
    for rule in plan.policy.metric_guardrails:
        counts = evidence.metrics.get(rule.metric, MetricCounts())
        if is_worse(
            plan.policy.metric(rule.metric),
            counts,
            tolerated=rule.margin,
            error=plan.guardrail_error,
            variance=plan.guardrail_tuning,
        ):
            found.append(
                f"{rule.metric}: worse by more than the margin, {difference(plan, rule.metric, counts)}"
            )
    return tuple(found)


def _harm_by_events(plan: Plan, evidence: Evidence) -> list[str]:
    """Return which events of the treatment's units roll back, and whether the breaker does."""
    found = []
    if is_open(evidence.last):
        found.append(describe_failures(evidence.last))
    error = plan.window_error(evidence.window)
    for guardrail in plan.policy.event_guardrails:
        counts = evidence.events.get(guardrail.event, EventCounts())
        arms = counts.treatment, counts.control
        if is_harm(*arms, ratio=guardrail.ratio, error=error):
            value = float(log_evidence_of_harm(*arms, ratio=guardrail.ratio))
            found.append(
                f"{guardrail.event}: {arms[0]} units of the treatment and {arms[1]} of control in window "
                f"{evidence.window + 1}, more than {guardrail.ratio:g} times the rate "
                f"(log e-value {value:.2f}, threshold {-np.log(error):.2f})"
            )
    return found


def describe_failures(last: LastRequests) -> str:
    """Return the reason of the breaker in words."""
    return f"breaker: the last {last.requests} requests, of {last.units} units, failed"


def find_blocks(plan: Plan, evidence: Evidence) -> tuple[list[str], list[Action]]:
    """Return what blocks a promotion although all else is reached, and the actions that the policy gives for it."""
    policy = plan.policy
    blocks, actions = [], []
    segments = {signal.name for signal in policy.signals if signal.column}
    for name, counts in evidence.metrics.items():
        if name not in segments and is_mismatch(counts.splits, error=policy.errors.mismatch):
            units = [sum(getattr(split, arm) for split in counts.splits) for arm in ("treatment", "control")]
            blocks.append(f"mismatch: {units[0]} and {units[1]} units entered {name}, which is not the split")
            actions.append(policy.on_mismatch)
    if evidence.stored_units >= policy.max_units:
        blocks.append(f"too many units: {evidence.stored_units} are stored, and no others are counted")
        actions.append(Action.hold)
    for name in (*evidence.signals, *signals_out_of_bounds(plan, evidence)):
        blocks.append(f"signal: {name}")
        actions.append(Action.hold)
    if evidence.idle_s >= policy.no_data_s:
        blocks.append(f"no data: an arm had no request for {evidence.idle_s / 60:.0f} min")
        actions.append(policy.on_no_data)
    return blocks, actions


def _missing(plan: Plan, evidence: Evidence) -> tuple[str, ...]:
    """Return what the step, and at the last step the promotion, still needs."""
    policy, planned = plan.policy, plan.steps[evidence.step]
    bake_s = policy.steps[evidence.step].bake_s
    missing = []
    if evidence.step_s < bake_s:
        missing.append(f"bake: {(bake_s - evidence.step_s) / 60:.0f} min")
    if evidence.watched_units < planned.units:
        missing.append(f"units: {evidence.watched_units} of {planned.units}")
    for guardrail in policy.event_guardrails:
        failing = evidence.events.get(guardrail.event, EventCounts()).watched
        error = policy.errors.no_harm
        proven = is_no_harm(
            failing, evidence.watched_units, planned_units=planned.units, limit=guardrail.limit, error=error
        )
        if not proven:
            bound = float(bound_of_failing_share(failing, evidence.watched_units, error=error))
            missing.append(f"no_harm: {guardrail.event} at most {bound:.3%}, limit {guardrail.limit:.3%}")
    if evidence.step == len(policy.steps) - 1:
        missing += [
            _open_goal(plan, goal, evidence) for goal in policy.goals if not _reached(plan, goal, evidence)
        ]
        missing += _unjudged_guardrails(policy, evidence)
    return tuple(missing)


def _unjudged_guardrails(policy: Policy, evidence: Evidence) -> list[str]:
    """Return the guardrails on metrics that have too few units to find any harm."""
    found = []
    for rule in policy.metric_guardrails:
        counts = evidence.metrics.get(rule.metric, MetricCounts())
        arms = [counts.treatment, counts.control][: num_arms(policy.metric(rule.metric))]
        units = min(int(arm.units) for arm in arms)
        if units < MIN_UNITS:
            found.append(f"metric: {units} of {MIN_UNITS} units an arm entered {rule.metric}")
    return found


def _reached(plan: Plan, goal: Goal, evidence: Evidence) -> bool:
    counts = evidence.metrics.get(goal.metric, MetricCounts())
    metric, variance = plan.policy.metric(goal.metric), plan.goal_tunings[goal.metric]
    return bool(is_reached(goal, metric, counts, error=plan.policy.errors.goals, variance=variance))


def _open_goal(plan: Plan, goal: Goal, evidence: Evidence) -> str:
    counts = evidence.metrics.get(goal.metric, MetricCounts())
    return f"goal: {goal.kind} of {goal.metric}, {difference(plan, goal.metric, counts)}"
