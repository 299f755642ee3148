"""Policies of rollouts, as `configs/rollout/<name>.yaml` and a user's own folder declare them.

A file has the fields of `RolloutSpec`. The rules of the values are those of `cluster.statistics.policy`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.errors import suggest_name
from cluster.statistics.policy import (
    DAY_S,
    MAX_UNITS,
    Action,
    ErrorRates,
    EventGuardrail,
    Goal,
    Margin,
    MetricGuardrail,
    Policy,
    Signal,
    Step,
    UnitEvent,
)
from serve_apps.rollout.assignment import UnitKind, require_percent
from serve_apps.rollout.evidence.metric_rules import MetricRule, Scoring, ShadowRule, scoring_as_json
from serve_apps.rollout.evidence.paired import require_paired_conditions
from serve_apps.rollout.policy.metric_spec import MetricSpec, SignalSpec, segment_rules
from serve_apps.rollout.policy.sections import (
    ErrorSpec,
    EventGuardrailSpec,
    GoalSpec,
    MetricGuardrailSpec,
    StepSpec,
    TrafficSpec,
)

if TYPE_CHECKING:
    from cluster.statistics.planning import Plan, Traffic

CANARY_WEIGHTS = (1.0, 5.0, 10.0, 25.0, 50.0)
YEAR_S = 365 * DAY_S
"""Longest time in a policy. Greater ones are mistakes, and some cannot be subtracted from a date."""
MAX_STEPS = 100
"""A plan computes each step, which takes milliseconds."""
EVENTS = tuple(event.value for event in UnitEvent)


class Mode(enum.Enum):
    """How the weight grows."""

    ab = "ab"
    """One step. The policy needs a goal."""
    canary = "canary"
    """The weights of `steps`, by default 1, 5, 10, 25 and 50 %."""
    linear = "linear"
    """Equal steps up to 50 %, each `increment` greater than the one before."""
    shadow = "shadow"
    """The version gets copies of `share` percent of the requests, and answers no client."""


@dataclass(kw_only=True, slots=True)
class RolloutSpec:
    """A policy as a file declares it."""

    mode: Mode = Mode.canary
    steps: list[StepSpec] = field(default_factory=list)
    """Only with `mode: canary`."""
    weight: float = 50.0
    """Only with `mode: ab`: percent of the units."""
    increment: float = 10.0
    """Only with `mode: linear`: percent of the units from one step to the next."""
    unit: UnitKind = UnitKind.header
    """What names the unit of a request: `header` (`X-Unit-ID`) or `subject` (the token's `sub`)."""
    share: float = 100.0
    """Only with `mode: shadow`: percent of the requests that are copied."""
    tolerance: float = 0.0
    """Only with `mode: shadow`: difference of two values of a regression that is no disagreement."""
    outcomes_independent: bool = False
    """Declares that no prediction has an influence on its outcome. Paired qualities need it."""
    bake_s: float = 0.0
    """Least time of each step, in seconds."""
    metrics: list[MetricSpec] = field(default_factory=list)
    goals: list[GoalSpec] = field(default_factory=list)
    event_guardrails: list[EventGuardrailSpec] = field(default_factory=list)
    metric_guardrails: list[MetricGuardrailSpec] = field(default_factory=list)
    signals: list[SignalSpec] = field(default_factory=list)
    """They hold, and never roll back or promote."""
    slow_ms: float | None = None
    """An answer that takes longer counts as slow. Null: only a client that gave up counts."""
    deadline_s: float = 7 * DAY_S
    """Time from the start to the promotion, in seconds."""
    watch_s: float = DAY_S
    """Time after the promotion in which the predecessor stays deployed and the controller can roll back, in seconds."""
    holdback: bool = False
    """Whether 1 % of the units keep the predecessor for this time, so that the guardrails can still compare."""
    unit_watch_s: float = 0.0
    no_data_s: float = 3600.0
    on_no_data: Action = Action.hold
    on_mismatch: Action = Action.hold
    on_deadline: Action = Action.hold
    max_units: int = MAX_UNITS
    """How many units of each kind are stored for a step. More of them hold the rollout, because clients can invent
    units."""
    errors: ErrorSpec = field(default_factory=ErrorSpec)
    traffic: TrafficSpec = field(default_factory=TrafficSpec)

    def __post_init__(self) -> None:
        """Validate all fields together.

        Raises:
            ValueError: A field is wrong, or has no meaning with the mode.
        """
        defaults = {
            "weight": (Mode.ab, 50.0),
            "increment": (Mode.linear, 10.0),
            "share": (Mode.shadow, 100.0),
            "tolerance": (Mode.shadow, 0.0),
        }
        for name, (mode, default) in defaults.items():
            if self.mode is not mode and getattr(self, name) != default:
                raise ValueError(f"rollout.{name} has a meaning only with `mode: {mode.value}`.")
        for name in ("holdback", "unit_watch_s"):
            if self.is_shadow and getattr(self, name) > 0:
                raise ValueError(
                    f"rollout.{name} has no meaning with `mode: shadow`: the version answers no client."
                )
        if self.steps and self.mode is not Mode.canary:
            raise ValueError("rollout.steps has a meaning only with `mode: canary`.")
        if self.mode is Mode.ab and not self.goals:
            raise ValueError("rollout.goals must not be empty with `mode: ab`: the goals decide.")
        if self.slow_ms is not None and not 0 < self.slow_ms < math.inf:
            raise ValueError(f"rollout.slow_ms must be a number above 0, or null, got {self.slow_ms:g}.")
        _require_few_steps(len(self.steps))
        for step in self.policy().steps:
            require_percent(step.weight, name="rollout.steps.weight")
        self._require_times()
        traffic = self.traffic
        if not 0 < traffic.units_per_hour < math.inf:
            raise ValueError(
                f"rollout.traffic.units_per_hour must be a number above 0, got {traffic.units_per_hour:g}."
            )
        if not 0 <= traffic.outcome_delay_s < math.inf:
            raise ValueError(
                f"rollout.traffic.outcome_delay_s must be at least 0, got {traffic.outcome_delay_s:g}."
            )
        if (self.metrics or self.is_shadow) and traffic.outcome_delay_s == 0:
            raise ValueError(
                "rollout.traffic.outcome_delay_s must be above 0 with metrics and with `mode: shadow`: a unit is "
                "counted after this time."
            )
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"rollout.tolerance must be a number of at least 0, got {self.tolerance:g}.")
        require_paired_conditions(
            self._rules(), outcomes_independent=self.outcomes_independent, is_shadow=self.is_shadow
        )
        self._require_slow_ms()
        if len({one.squared_error_limit for one in self.metrics}) > 1:
            raise ValueError("rollout.metrics must have the same squared_error_limit.")
        for event, share in traffic.events.items():
            if event not in EVENTS:
                raise ValueError(f"rollout.traffic.events: no event '{event}'.{suggest_name(event, EVENTS)}")
            if not 0 <= share < 1:
                raise ValueError(
                    f"rollout.traffic.events.{event} must be 0 or more and below 1, got {share}."
                )

    def _require_times(self) -> None:
        """Require that no time is longer than a year. A stored policy of an earlier release may have a longer one.

        Raises:
            ValueError: A time is longer.
        """
        times = {name: getattr(self, name) for name in ("bake_s", "deadline_s", "watch_s", "unit_watch_s")}
        times["traffic.outcome_delay_s"] = self.traffic.outcome_delay_s
        for number, step in enumerate(self.steps):
            times[f"steps.{number}.bake_s"] = step.bake_s or 0.0
        for name, time in times.items():
            if time > YEAR_S:
                raise ValueError(
                    f"rollout.{name} must be at most {YEAR_S:.0f} seconds (a year), got {time:g}."
                )

    def _require_slow_ms(self) -> None:
        """Require `slow_ms` for a shadow's guardrail on slow copies: no client waits for a copy, so none gives up.

        Raises:
            ValueError: It is missing.
        """
        events = [one.event for one in self.event_guardrails]
        if self.is_shadow and UnitEvent.slow in events and self.slow_ms is None:
            raise ValueError("rollout.slow_ms must be given for a guardrail on `slow` with `mode: shadow`.")

    @property
    def is_shadow(self) -> bool:
        return self.mode is Mode.shadow

    def _rules(self) -> list[MetricRule]:
        return [one.rule(is_shadow=self.is_shadow) for one in self.metrics]

    def _signals(self) -> list[Signal]:
        return [signal for one in self.signals for signal in one.signals()]

    def policy(self) -> Policy:
        """Return the policy.

        Raises:
            ValueError: A value is wrong.
        """
        return Policy(
            steps=self._steps(),
            metrics=tuple(one.metric(is_shadow=self.is_shadow) for one in self.metrics),
            goals=tuple(
                Goal(
                    metric=one.metric,
                    kind=one.kind,
                    margin=Margin(size=one.margin, is_relative=one.is_relative),
                    expected=one.expected,
                )
                for one in self.goals
            ),
            event_guardrails=tuple(
                EventGuardrail(event=one.event, ratio=one.ratio, limit=one.limit)
                for one in self.event_guardrails
            ),
            metric_guardrails=tuple(
                MetricGuardrail(
                    metric=one.metric, margin=Margin(size=one.margin, is_relative=one.is_relative)
                )
                for one in self.metric_guardrails
            ),
            signals=tuple(self._signals()),
            is_shadow=self.is_shadow,
            deadline_s=self.deadline_s,
            watch_s=self.watch_s,
            holdback=self.holdback,
            unit_watch_s=self.unit_watch_s,
            no_data_s=self.no_data_s,
            on_no_data=self.on_no_data,
            on_mismatch=self.on_mismatch,
            on_deadline=self.on_deadline,
            max_units=self.max_units,
            errors=ErrorRates(
                goals=self.errors.goals,
                no_harm=self.errors.no_harm,
                guardrails=self.errors.guardrails,
                mismatch=self.errors.mismatch,
                signals=self.errors.signals,
            ),
        )

    def expected_traffic(self) -> Traffic:
        """Return what the plan assumes about the requests.

        Raises:
            ValueError: A baseline is wrong.
        """
        from cluster.statistics.planning import Baseline, Traffic  # SciPy is slow to import

        return Traffic(
            units_per_hour=self.traffic.units_per_hour,
            events={UnitEvent(event): share for event, share in self.traffic.events.items()},
            metrics={
                name: Baseline(mean=one.mean, deviation=one.deviation)
                for name, one in self.traffic.metrics.items()
            },
            outcome_delay_s=self.traffic.outcome_delay_s,
        )

    def scoring(self) -> dict[str, Any]:
        """Return how units are scored, as the event of the start has it; {} if the logs are not needed."""
        if not self.metrics and not self.is_shadow:
            return {}
        slow_ms = math.inf if self.slow_ms is None else self.slow_ms
        return scoring_as_json(
            Scoring(
                outcome_window_s=self.traffic.outcome_delay_s,
                rules=tuple(self._rules()),
                segments=segment_rules(self._signals()),
                shadow=ShadowRule(slow_ms=slow_ms, tolerance=self.tolerance) if self.is_shadow else None,
                squared_error_limit=self.metrics[0].squared_error_limit if self.metrics else 1.0,
            )
        )

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            RolloutError: The policy cannot finish before its deadline or with `max_units`, or a baseline is missing.
            ConfigError: A baseline is wrong, or a number is too large or too small.
        """
        from cluster.errors import ConfigError
        from cluster.statistics.planning import plan
        from serve_apps.rollout.policy.expected_units import require_room

        try:
            traffic = self.expected_traffic()
        except ValueError as error:
            raise ConfigError(f"rollout.traffic: {error}") from error
        try:
            the_plan = plan(self.policy(), traffic)
        except ArithmeticError as error:
            raise ConfigError(f"rollout: a number is too large or too small for a plan: {error}.") from error
        require_room(the_plan, traffic, has_metrics=bool(self.metrics) or self.is_shadow)
        return the_plan

    def _steps(self) -> tuple[Step, ...]:
        match self.mode:
            case Mode.ab:
                weights = [self.weight]
            case Mode.shadow:
                weights = [self.share]
            case Mode.linear:
                if not 0 < self.increment <= 50:
                    raise ValueError(
                        f"rollout.increment must be above 0 and at most 50 percent, got {self.increment:g}."
                    )
                num_steps = round(50 / self.increment, 6)
                _require_few_steps(num_steps)
                count = math.ceil(num_steps)
                weights = [min(round(self.increment * number, 2), 50.0) for number in range(1, count + 1)]
            case Mode.canary:
                steps = self.steps or [StepSpec(weight=weight) for weight in CANARY_WEIGHTS]
                return tuple(
                    Step(weight=one.weight, bake_s=self.bake_s if one.bake_s is None else one.bake_s)
                    for one in steps
                )
        return tuple(Step(weight=weight, bake_s=self.bake_s) for weight in weights)


def _require_few_steps(number: float) -> None:
    """Require a number of steps that a plan can have.

    Raises:
        ValueError: There are more than `MAX_STEPS`.
    """
    if number > MAX_STEPS:
        raise ValueError(f"A rollout has at most {MAX_STEPS} steps, got {number:g}.")
