"""Metrics and signals of a policy, as a file declares them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.errors import suggest_name
from cluster.statistics.policy import Form, Margin, Metric, Signal
from serve_apps.rollout.evidence.metric_rules import MEASURES, QUALITIES, MetricRule, Per, SegmentRule

MAX_NAME = 128
"""Greatest length of the name of a metric's counts in the database."""
MAX_SEGMENTS = 50


@dataclass(kw_only=True, slots=True)
class MetricSpec:
    """A number that each unit gives, once its outcome window is over."""

    name: str = ""
    quality: str | None = None
    """How a prediction is scored against its outcome: `brier`, `accuracy` or `squared_error`. Null: as the name."""
    measure: str | None = None
    """What a request costs, without outcomes: `cpu_ms` or `took_ms`. Null: as the name."""
    form: Form = Form.mean
    """`mean`, `ratio`, `adjusted` (CUPED) or `paired`."""
    per: Per | None = None
    """Only with `form: ratio`: the denominator, `rows` (default of a quality) or `requests` (default of a measure)."""
    covariate: str | None = None
    """Only with `form: adjusted`: an input of the model, as it was at the unit's first request."""
    squared_error_limit: float = 1.0
    """Greatest squared error that is counted."""

    @property
    def scored_by(self) -> str:
        return self.quality or self.measure or self.name

    def metric(self, *, is_shadow: bool = False) -> Metric:
        """Return the metric. With a shadow, a mean is the mean of the paired differences.

        Raises:
            ValueError: A field is wrong, or has no meaning with the form.
        """
        self._validate()
        better = (QUALITIES | MEASURES)[self.scored_by]
        form = Form.paired if is_shadow and self.form is Form.mean else self.form
        return Metric(name=self.name, form=form, better=better)

    def rule(self, *, is_shadow: bool = False) -> MetricRule:
        """Return how a unit's value is computed. Raises as `metric` does."""
        default = Per.rows if self.scored_by in QUALITIES else Per.requests
        return MetricRule(
            name=self.name,
            score=self.scored_by,
            form=self.metric(is_shadow=is_shadow).form,
            per=self.per or default,
            covariate=self.covariate or "",
        )

    def _validate(self) -> None:
        if len(self.name) > MAX_NAME:
            raise ValueError(f"rollout.metrics: '{self.name}' is longer than {MAX_NAME} characters.")
        if self.quality and self.measure:
            raise ValueError(
                f"rollout.metrics: '{self.name}' has both a quality and a measure. Give one of them."
            )
        known = QUALITIES | MEASURES
        kinds = {"quality": QUALITIES} if self.quality else {"measure": MEASURES} if self.measure else {}
        for kind, names in (kinds or {"quality": known}).items():
            if self.scored_by not in names:
                raise ValueError(
                    f"rollout.metrics: no {kind} '{self.scored_by}'.{suggest_name(self.scored_by, names)} Known: "
                    f"{', '.join(names)}."
                )
        for name, form in (("per", Form.ratio), ("covariate", Form.adjusted)):
            if getattr(self, name) and self.form is not form:
                raise ValueError(
                    f"rollout.metrics: {name} of '{self.name}' has a meaning only with `form: {form}`."
                )
        if self.form is Form.adjusted and not self.covariate:
            raise ValueError(
                f"rollout.metrics: '{self.name}' is adjusted, so it needs a covariate: the name of an input."
            )
        if not 0 < self.squared_error_limit < math.inf:
            raise ValueError(
                f"rollout.metrics: squared_error_limit of '{self.name}' must be a number above 0, got "
                f"{self.squared_error_limit:g}."
            )


@dataclass(kw_only=True, slots=True)
class SignalSpec:
    """Holds the rollout while a metric, of all units or of a segment, is proven to be worse by more than the margin."""

    metric: str = ""
    margin: float = 0.0
    is_relative: bool = False
    column: str | None = None
    """An input of the model whose values are segments. Null: all units."""
    values: list[str] = field(default_factory=list)
    """Only with `column`: the segments, each a signal of its own."""
    share: float = 1.0
    """Share of the units in the smallest segment, which the plan assumes."""

    def signals(self) -> list[Signal]:
        """Return one signal for each segment, or one for all units.

        Raises:
            ValueError: A field is wrong.
        """
        if bool(self.column) != bool(self.values):
            raise ValueError(
                f"rollout.signals: '{self.metric}' needs both a column and its values, or neither."
            )
        if len(self.values) > MAX_SEGMENTS:
            raise ValueError(
                f"rollout.signals: '{self.metric}' has {len(self.values)} values, at most {MAX_SEGMENTS} are possible."
            )
        margin = Margin(size=self.margin, is_relative=self.is_relative)
        signals = [
            Signal(metric=self.metric, margin=margin, column=self.column or "", value=value, share=self.share)
            for value in self.values or [""]
        ]
        for signal in signals:
            if len(signal.name) > MAX_NAME:
                raise ValueError(
                    f"rollout.signals: '{signal.name}' is longer than {MAX_NAME} characters. Give a shorter metric."
                )
        return signals


def segment_rules(signals: list[Signal]) -> tuple[SegmentRule, ...]:
    """Return what must be counted for signals on segments."""
    return tuple(
        SegmentRule(name=one.name, metric=one.metric, column=one.column, value=one.value)
        for one in signals
        if one.column
    )
