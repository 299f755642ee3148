"""What a rollout's policy says to the statistics: steps, metrics, goals, guardrails and error rates.

The controller reads policies from files. These classes validate the values, and know nothing of files.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field

DAY_S = 86_400.0
MAX_UNITS = 1_000_000
"""How many units of each kind are stored for one step of a rollout, by default."""


class UnitEvent(enum.StrEnum):
    """What a unit can have for the first time in a window."""

    failure = "failure"
    """Fallback, 5xx or timeout."""
    refusal = "refusal"
    """The replica answered 4xx."""
    slow = "slow"
    """The answer was slower than the policy's limit, or the client gave up."""
    disagreement = "disagreement"
    """Only of a shadow: it gave another label than the champion, or a value that is too far from the champion's."""


REQUEST_EVENTS = (UnitEvent.failure, UnitEvent.refusal, UnitEvent.slow)
"""What a unit of an arm can have. A shadow's units can have all events."""


class Form(enum.StrEnum):
    """How a metric is computed from the units."""

    mean = "mean"
    ratio = "ratio"
    """Ratio of two sums, such as CPU seconds per request."""
    adjusted = "adjusted"
    """Mean with a covariate from before the rollout (CUPED)."""
    paired = "paired"
    """Mean difference of both versions on the same requests."""


class Better(enum.StrEnum):
    """Which values of a metric are better."""

    high = "high"
    low = "low"


class GoalKind(enum.StrEnum):
    """What a goal proves about the treatment."""

    superiority = "superiority"
    """It is better than control by more than the margin."""
    non_inferiority = "non_inferiority"
    """It is worse than control by less than the margin."""


class Action(enum.StrEnum):
    """What to do without data, after a mismatch, or at the deadline."""

    hold = "hold"
    roll_back = "roll_back"
    warn = "warn"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A number that each unit gives, once its outcome window is over."""

    name: str
    form: Form = Form.mean
    better: Better = Better.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Margin:
    """A difference between the arms that the policy tolerates or requires."""

    size: float = 0.0
    """In the unit of the metric, at least 0."""
    is_relative: bool = False
    """The size is a share of the control's value, such as 0.1 for 10 %. For metrics above 0 that are not paired."""

    def __post_init__(self) -> None:
        if not 0 <= self.size < math.inf:
            raise ValueError(f"margin.size must be a finite number of at least 0, got {self.size}.")
        if self.is_relative and self.size >= 1:
            raise ValueError(f"A relative margin.size must be below 1, got {self.size}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What must be proven before the treatment is promoted."""

    metric: str
    kind: GoalKind
    margin: Margin = Margin()
    expected: float = 0.0
    """Improvement that the plan assumes, in the unit of the metric."""

    def __post_init__(self) -> None:
        if self.kind is GoalKind.non_inferiority and self.margin.size == 0:
            raise ValueError(f"goal '{self.metric}': non-inferiority needs a margin greater than 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EventGuardrail:
    """Rolls back if too many units of the treatment have an event."""

    event: UnitEvent
    ratio: float = 1.0
    """Rate, relative to that of control, that is tolerated; at least 1."""
    limit: float
    """Before a step ends, `no_harm` must prove that the share of failing units is below this limit."""

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"guardrail '{self.event}': ratio must be at least 1, got {self.ratio}.")
        if not 0 < self.limit < 1:
            raise ValueError(f"guardrail '{self.event}': limit must be between 0 and 1, got {self.limit}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricGuardrail:
    """Rolls back if the treatment is proven to be worse than control by more than a margin."""

    metric: str
    margin: Margin = Margin()


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """Holds the rollout while the treatment is proven to be worse in a metric by more than a margin.

    It never rolls back and never promotes.
    """

    metric: str
    margin: Margin = Margin()
    column: str = ""
    """Logged input whose values are segments; "" means all units."""
    value: str = ""
    """The segment's value of the column, as text."""
    share: float = 1.0
    """Share of the units in the segment, which the plan assumes."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"signal '{self.name}': share must be above 0 and at most 1, got {self.share:g}."
            )

    @property
    def name(self) -> str:
        """Name of the signal, and of its counts in the evidence."""
        return f"{self.metric}[{self.column}={self.value}]" if self.column else self.metric


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One weight of the rollout."""

    weight: float
    """Percent of the units in the treatment, at most 50: above it, the arms have no equal size. Of a shadow: percent of
    the requests that are copied."""
    bake_s: float = 0.0
    """Least time of the step, in seconds."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 100:
            raise ValueError(f"step.weight must be above 0 and at most 100 percent, got {self.weight}.")
        if not 0 <= self.bake_s < math.inf:
            raise ValueError(f"step.bake_s must be a finite number of at least 0, got {self.bake_s}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRates:
    """Probabilities of false results over the whole rollout, whatever the number of looks."""

    goals: float = 0.05
    """That a goal is reached although it is not true. All goals must be reached, so each goal has the whole rate."""
    no_harm: float = 0.05
    """That `no_harm` is concluded at the last step although a failing share is at its limit or above."""
    guardrails: float = 0.05
    """That any guardrail rolls back a treatment that does no harm."""
    mismatch: float = 0.001
    """That a sample-ratio mismatch is reported for a metric although there is none."""
    signals: float = 0.05
    """That any signal holds a treatment that does no harm."""

    def __post_init__(self) -> None:
        for name in ("goals", "no_harm", "guardrails", "mismatch", "signals"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(f"errors.{name} must be between 0 and 0.5, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The rules of one rollout."""

    steps: tuple[Step, ...]
    metrics: tuple[Metric, ...] = ()
    goals: tuple[Goal, ...] = ()
    event_guardrails: tuple[EventGuardrail, ...]
    metric_guardrails: tuple[MetricGuardrail, ...] = ()
    signals: tuple[Signal, ...] = ()
    is_shadow: bool = False
    """The treatment gets only copies of requests, in one step. It is never promoted."""
    deadline_s: float
    """Time from the start of the rollout to its promotion, in seconds."""
    watch_s: float = DAY_S
    """Time after the promotion in which the controller can still roll back, in seconds."""
    holdback: bool = False
    """Whether a part of the units keeps the champion before the promotion, so that the guardrails can still compare.
    Without a holdback, only a version whose requests all fail is rolled back then."""
    unit_watch_s: float = 0.0
    """`no_harm` counts a unit after this time since its first request, in seconds."""
    no_data_s: float = 3600.0
    """There are no data if the treatment or control had no unit for this time, in seconds."""
    on_no_data: Action = Action.hold
    on_mismatch: Action = Action.hold
    """`warn` lets the rollout go on to its last step. No mismatch is ever promoted."""
    on_deadline: Action = Action.hold
    max_units: int = MAX_UNITS
    """How many units of each kind are stored for a step. Clients can invent units, so with more of them it holds."""
    errors: ErrorRates = field(default_factory=ErrorRates)

    def __post_init__(self) -> None:
        weights = [step.weight for step in self.steps]
        if not weights or any(later <= earlier for earlier, later in itertools.pairwise(weights)):
            raise ValueError(f"steps must have increasing weights, got {weights}.")
        greatest = 100 if self.is_shadow else 50
        if weights[-1] > greatest:
            raise ValueError(
                f"step.weight must be above 0 and at most {greatest} percent, got {weights[-1]:g}."
            )
        if not self.event_guardrails:
            raise ValueError(
                "event_guardrails must not be empty: without one, nothing proves that a version works."
            )
        for name in ("deadline_s", "no_data_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}.")
        for name in ("watch_s", "unit_watch_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if self.max_units < 1:
            raise ValueError(f"max_units must be at least 1, got {self.max_units}.")
        if self.holdback and self.watch_s == 0:
            raise ValueError("watch_s must be above 0 with holdback: the holdback ends with it.")
        self._validate_names()
        self._validate_shadow()

    def metric(self, name: str) -> Metric:
        """Return the metric with this name."""
        return next(metric for metric in self.metrics if metric.name == name)

    @property
    def margins(self) -> list[tuple[str, Margin]]:
        """Metric and margin of each goal, of each guardrail on a metric, and of each signal."""
        rules: list[Goal | MetricGuardrail | Signal] = [*self.goals, *self.metric_guardrails, *self.signals]
        return [(rule.metric, rule.margin) for rule in rules]

    @property
    def num_guardrails(self) -> int:
        """Number of tests that share the error of the guardrails.

        With a holdback, each guardrail on a metric is tested twice: before the promotion and after it, on other units.
        Guardrails on events have windows for both.
        """
        return len(self.event_guardrails) + len(self.metric_guardrails) * (2 if self.holdback else 1)

    @property
    def num_signals(self) -> int:
        """Number of tests that share the error of the signals.

        With a holdback, each signal is tested twice, as each guardrail on a metric.
        """
        return len(self.signals) * (2 if self.holdback else 1)

    def _validate_names(self) -> None:
        known = [metric.name for metric in self.metrics]
        events = [guardrail.event.value for guardrail in self.event_guardrails]
        goals = [goal.metric for goal in self.goals]
        guarded = [guardrail.metric for guardrail in self.metric_guardrails]
        lists = {
            "metrics": known,
            "event_guardrails": events,
            "goals": goals,
            "metric_guardrails": guarded,
            "signals": [signal.name for signal in self.signals],
        }
        for kind, names in lists.items():
            if len(set(names)) < len(names):
                raise ValueError(f"{kind} must have different names, got {', '.join(names)}.")
        for name, margin in self.margins:
            if name not in known:
                raise ValueError(f"No metric '{name}'. Known: {', '.join(known) or 'none'}.")
            if margin.is_relative and self.metric(name).form is Form.paired:
                raise ValueError(f"Metric '{name}' is paired, so its margin cannot be relative.")

    def _validate_shadow(self) -> None:
        """Require what a shadow can show: it has one step, and each request is scored by both versions."""
        if not self.is_shadow:
            if any(guardrail.event is UnitEvent.disagreement for guardrail in self.event_guardrails):
                raise ValueError("event_guardrails: only a shadow can have the event 'disagreement'.")
            return
        if len(self.steps) > 1:
            raise ValueError(f"A shadow has one step, got {len(self.steps)}.")
        for metric in self.metrics:
            if metric.form is not Form.paired:
                raise ValueError(
                    f"Metric '{metric.name}' must be paired: a shadow scores the champion's requests."
                )
        for guardrail in self.event_guardrails:
            if guardrail.ratio != 1:
                raise ValueError(
                    f"guardrail '{guardrail.event}': ratio has no meaning for a shadow, because it has no control arm."
                )
