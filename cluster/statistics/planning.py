"""The plan of a rollout: shares of the error rates, tuning of the sequences, and units and time of each step.

Everything here is fixed before the first request. If the tuning or the error of a test were chosen after a look at the
data, the test would have no error rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.errors import RolloutError
from cluster.statistics.policy import (
    DAY_S,
    EventGuardrail,
    Form,
    Goal,
    GoalKind,
    Margin,
    Metric,
    Policy,
    UnitEvent,
)
from cluster.statistics.power import (
    MAX_UNITS,
    smallest_effect,
    smallest_share,
    smallest_share_above,
    units_for_mean,
    units_for_no_harm,
)
from cluster.statistics.sequences import MIN_UNITS, tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What is known about a metric before the rollout."""

    mean: float
    deviation: float
    """Standard deviation of a unit's value: of a ratio, that of (numerator - ratio * denominator) / mean denominator;
    of an adjusted metric, that which the covariate leaves; of a paired metric, that of the differences."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.deviation < math.inf):
            raise ValueError(f"A baseline needs a finite mean and a deviation above 0, got {self}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What a plan assumes about the requests. Wrong assumptions cost time or power, but never change an error rate."""

    units_per_hour: float
    """Number of units, of all arms together, that come for the first time in an hour of a step."""
    events: Mapping[UnitEvent, float]
    """Share of the champion's units that have an event in a step."""
    metrics: Mapping[str, Baseline] = field(default_factory=dict)
    outcome_delay_s: float = 0.0
    """Time from a unit's first request to the end of its outcome window, in seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.units_per_hour < math.inf:
            raise ValueError(f"units_per_hour must be a finite number above 0, got {self.units_per_hour}.")
        for event, share in self.events.items():
            if not 0 <= share < 1:
                raise ValueError(
                    f"The share of units with '{event}' must be 0 or more and below 1, got {share}."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step of the plan."""

    weight: float
    units: int
    """Number of units of each arm that the step needs."""
    duration_s: float
    smallest_shares: Mapping[UnitEvent, float]
    """For each event: the smallest share of the treatment's units that is found in 90 % of cases, with the units that
    come in the step's first window."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A policy with all numbers that the verdicts need."""

    policy: Policy
    steps: tuple[PlannedStep, ...]
    guardrail_error: float
    """Error of each guardrail."""
    num_windows: int
    """Greatest number of windows until the deadline, and after the promotion. The last one never ends."""
    goal_tunings: Mapping[str, float]
    """Variance of the mixture for the goal of each metric."""
    guardrail_tuning: float
    """Variance of the mixture for all guardrails on metrics."""
    smallest_effects: Mapping[str, float]
    """For each guardrail on a metric: how far beyond its margin the treatment must be worse to be found at the end."""
    signal_error: float = 0.0
    """Error of each signal; 0 without signals, as in plans of older releases."""
    signal_tunings: Mapping[str, float] = field(default_factory=dict)
    """Variance of the mixture for each signal, by its name."""
    smallest_signals: Mapping[str, float] = field(default_factory=dict)
    """For each signal: how far beyond its margin the treatment must be worse to be found at the end."""

    @property
    def duration_s(self) -> float:
        return sum(step.duration_s for step in self.steps)

    def window_error(self, window: int) -> float:
        """Return the error of a guardrail on events in a window, from 0.

        The shares fall like 1, 1/2, 1/3 …. Most harm is there from the beginning, and the large first share finds it
        with few units. Harm that begins later still has a share.

        Raises:
            ValueError: the plan has no such window.
        """
        if not 0 <= window < self.num_windows:
            raise ValueError(f"The plan has the windows 0 to {self.num_windows - 1}, got {window}.")
        harmonic = sum(1 / number for number in range(1, self.num_windows + 1))
        return self.guardrail_error / (window + 1) / harmonic


def plan(policy: Policy, traffic: Traffic) -> Plan:
    """Return the plan of a policy.

    Raises:
        RolloutError: the traffic has no baseline of an event or metric, a limit cannot be proven, or the plan needs
            more time than the deadline.
    """
    _require_baselines(policy, traffic)
    windows = len(policy.steps) + math.floor(policy.deadline_s / DAY_S) + math.ceil(policy.watch_s / DAY_S)
    error = policy.errors.guardrails / policy.num_guardrails
    goal_units = {goal.metric: units_of_goal(goal, policy, traffic) for goal in policy.goals}
    per_step = max(_units_of_no_harm(guardrail, policy, traffic) for guardrail in policy.event_guardrails)
    before = per_step * (len(policy.steps) - 1)
    of_guardrails = MIN_UNITS - before if policy.metric_guardrails else 1
    last = max(per_step, of_guardrails, *(units - before for units in goal_units.values()))
    total = before + last
    draft = Plan(
        policy=policy,
        steps=(),
        guardrail_error=error,
        num_windows=windows,
        goal_tunings={
            metric: tuning(num_arms(policy.metric(metric)) * units, error=policy.errors.goals)
            for metric, units in goal_units.items()
        },
        guardrail_tuning=tuning(2 * max(total, MIN_UNITS), error=error),
        smallest_effects={
            guardrail.metric: smallest_effect(
                max(total, MIN_UNITS),
                deviation=traffic.metrics[guardrail.metric].deviation,
                error=error,
                arms=num_arms(policy.metric(guardrail.metric)),
            )
            for guardrail in policy.metric_guardrails
        },
    )
    draft = _with_signals(draft, traffic, total)
    for _ in policy.steps[:-1]:
        draft = _with_next_step(draft, traffic, per_step)
    return _require_time(_with_next_step(draft, traffic, last))


def _with_signals(draft: Plan, traffic: Traffic, total: int) -> Plan:
    """Return the plan with the error, the tunings and the smallest effects of its signals.

    Args:
        draft: The plan.
        traffic: What is assumed.
        total: Number of units of each arm in all steps.
    """
    signals, policy = draft.policy.signals, draft.policy
    if not signals:
        return draft
    error = policy.errors.signals / policy.num_signals
    units = {signal.name: max(math.ceil(total * signal.share), MIN_UNITS) for signal in signals}
    arms = {signal.name: num_arms(policy.metric(signal.metric)) for signal in signals}
    return replace(
        draft,
        signal_error=error,
        signal_tunings={name: tuning(arms[name] * units[name], error=error) for name in units},
        smallest_signals={
            signal.name: smallest_effect(
                units[signal.name],
                deviation=traffic.metrics[signal.metric].deviation,
                error=error,
                arms=arms[signal.name],
            )
            for signal in signals
        },
    )


def num_arms(metric: Metric) -> int:
    """Return from how many arms a metric is computed: 1 if both versions scored the same requests, else 2."""
    return 1 if metric.form is Form.paired else 2


def margin_size(margin: Margin, control: float) -> float:
    """Return a margin in the unit of the metric, if the control arm has this value."""
    return margin.size * abs(control) if margin.is_relative else margin.size


def units_of_goal(goal: Goal, policy: Policy, traffic: Traffic) -> int:
    """Return how many units of each arm a goal needs.

    Raises:
        RolloutError: the expected improvement does not reach the goal.
    """
    baseline = traffic.metrics[goal.metric]
    margin = margin_size(goal.margin, baseline.mean)
    distance = goal.expected + (margin if goal.kind is GoalKind.non_inferiority else -margin)
    if distance <= 0:
        raise RolloutError(
            f"Goal '{goal.metric}' cannot be reached: the expected improvement {goal.expected:g} is not beyond the "
            f"margin {margin:g}. Give a smaller margin or a greater `expected`."
        )
    units = units_for_mean(
        distance,
        deviation=baseline.deviation,
        error=policy.errors.goals,
        arms=num_arms(policy.metric(goal.metric)),
    )
    if units >= MAX_UNITS:
        raise RolloutError(
            f"Goal '{goal.metric}' needs more than {MAX_UNITS:,} units an arm. Give a greater margin."
        )
    return units


def _units_of_no_harm(guardrail: EventGuardrail, policy: Policy, traffic: Traffic) -> int:
    share = traffic.events[guardrail.event]
    units = units_for_no_harm(share, limit=guardrail.limit, error=policy.errors.no_harm)
    if units >= MAX_UNITS:
        raise RolloutError(
            f"Guardrail '{guardrail.event}' cannot prove its limit: {share:.3%} of the champion's units have this "
            f"event, and the limit is {guardrail.limit:.3%}. Give a limit that is clearly above the champion's share."
        )
    return units


def _with_next_step(draft: Plan, traffic: Traffic, units: int) -> Plan:
    """Return the plan with one more step, of so many units. The last step also waits for the outcomes of its units."""
    policy, number = draft.policy, len(draft.steps)
    step = policy.steps[number]
    seconds = units / (traffic.units_per_hour / 3600 * step.weight / 100) + policy.unit_watch_s
    waits = policy.goals or policy.metric_guardrails or policy.is_shadow
    if number == len(policy.steps) - 1 and waits:
        seconds += traffic.outcome_delay_s
    planned = PlannedStep(
        weight=step.weight,
        units=units,
        duration_s=max(step.bake_s, seconds),
        smallest_shares=_smallest_shares(draft, traffic, units=units, seconds=seconds),
    )
    return replace(draft, steps=(*draft.steps, planned))


def _smallest_shares(draft: Plan, traffic: Traffic, *, units: int, seconds: float) -> dict[UnitEvent, float]:
    """Return the smallest share of units with each event that the next step finds."""
    policy = draft.policy
    if policy.is_shadow:
        return {
            guardrail.event: smallest_share_above(units, limit=guardrail.limit, error=draft.guardrail_error)
            for guardrail in policy.event_guardrails
        }
    window = min(len(draft.steps) + math.floor(draft.duration_s / DAY_S), draft.num_windows - 1)
    in_window = math.ceil(units * min(DAY_S / seconds, 1))
    return {
        guardrail.event: smallest_share(
            in_window,
            traffic.events[guardrail.event],
            ratio=guardrail.ratio,
            error=draft.window_error(window),
        )
        for guardrail in policy.event_guardrails
    }


def _require_baselines(policy: Policy, traffic: Traffic) -> None:
    for guardrail in policy.event_guardrails:
        if guardrail.event not in traffic.events:
            raise RolloutError(f"The plan needs the champion's share of units with '{guardrail.event}'.")
    for name, margin in policy.margins:
        if name not in traffic.metrics:
            raise RolloutError(f"The plan needs mean and deviation of the metric '{name}'.")
        mean = traffic.metrics[name].mean
        if margin.is_relative and mean <= 0:
            raise RolloutError(
                f"Metric '{name}' has the mean {mean:g}, so its margin cannot be relative. Give a size."
            )


def _require_time(complete: Plan) -> Plan:
    """Return the plan.

    Raises:
        RolloutError: the steps need more time than the deadline.
    """
    needed, deadline_s = complete.duration_s, complete.policy.deadline_s
    if needed > deadline_s:
        longest = max(complete.steps, key=lambda step: step.duration_s)
        raise RolloutError(
            f"The rollout needs {needed / 3600:.1f} h, but its deadline is after {deadline_s / 3600:.1f} h. Its "
            f"longest step, {longest.weight:g} %, needs {longest.duration_s / 3600:.1f} h for {longest.units:,} units "
            "an arm. Give a later deadline, greater limits or margins, or fewer small steps."
        )
    return complete
