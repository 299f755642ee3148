"""From the rows of a cohort's units to the sums of each metric, by arm. Each unit gives one value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson

from cluster.statistics.moments import Moments
from cluster.statistics.policy import Form
from cluster.statistics.quality import Quality
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.evidence.cohorts import UnitRows
from serve_apps.rollout.evidence.metric_rules import MetricRule, Per, Scoring, SegmentRule
from serve_apps.rollout.evidence.pairing import Pair, Predicted
from serve_apps.rollout.evidence.scoring import Outcomes, Scorer

Units = Mapping[str, UnitRows]
PairsOf = Callable[[UnitRows], list[Pair]]


class UnitValue(NamedTuple):
    """What one unit gives to one metric."""

    value: float
    second: float = 0.0
    """The denominator of a ratio, or the covariate of an adjusted metric."""


class CohortValues:
    """Computes the values of one cohort.

    Args:
        scorer: Scores rows.
        outcomes: The outcomes of the cohort's answers.
        pairs_of: Returns a unit's requests with the predictions of both versions. Only paired metrics call it.
    """

    def __init__(self, scorer: Scorer, outcomes: Outcomes, *, pairs_of: PairsOf) -> None:
        self._scorer = scorer
        self._outcomes = outcomes
        self._pairs_of = pairs_of

    def sums(self, units: Units, scoring: Scoring) -> dict[str, dict[Arm, Moments]]:
        """Return the sums of all metrics, and of their segments, by name and arm."""
        found = {}
        for rule in scoring.rules:
            values = {
                name: value for name, unit in units.items() if (value := self._value(rule, unit)) is not None
            }
            found[rule.name] = _by_arm(values, units)
            for segment in scoring.segments:
                if segment.metric == rule.name:
                    inside = {name: one for name, one in values.items() if _is_inside(units[name], segment)}
                    found[segment.name] = _by_arm(inside, units)
        return found

    def _value(self, rule: MetricRule, unit: UnitRows) -> UnitValue | None:
        """Return what a unit gives to a metric; None if it does not enter."""
        if rule.form is Form.paired:
            differences = list(self._differences(rule, unit))
            return UnitValue(float(np.mean(differences))) if differences else None
        values, denominator = self._values(rule, unit)
        if not values:
            return None
        match rule.form:
            case Form.ratio:
                return UnitValue(math.fsum(values), denominator)
            case Form.adjusted:
                before = covariate(unit, rule.covariate)
                return None if before is None else UnitValue(float(np.mean(values)), before)
            case _:
                return UnitValue(float(np.mean(values)))

    def _values(self, rule: MetricRule, unit: UnitRows) -> tuple[list[float], float]:
        """Return a unit's values and their denominator: the number of rows or of requests with a value."""
        values: list[float] = []
        rows = requests = 0
        for answer in unit.answers:
            if rule.is_quality:
                scores = self._scorer.rows(answer, Quality(rule.score), self._outcomes)
                num_rows = len(scores)
            else:
                measured = float(getattr(answer, rule.score))
                scores = [measured] if measured > 0 else []
                num_rows = len(answer.predictions) if scores and rule.per is Per.rows else 0
            values += scores
            rows += num_rows
            requests += bool(scores)
        return values, float(rows if rule.per is Per.rows else requests)

    def _differences(self, rule: MetricRule, unit: UnitRows) -> Iterator[float]:
        """Yield treatment minus champion for each row with an outcome, or of a measure for each copied request."""
        if not rule.is_quality:
            for answer in unit.answers:
                ours, theirs = (getattr(one, rule.score) for one in (unit.copies[answer.request_id], answer))
                if ours > 0 and theirs > 0:
                    yield ours - theirs
            return
        quality = Quality(rule.score)
        for pair in self._pairs_of(unit):
            for row in range(len(pair.answer.predictions)):
                outcome = self._outcomes.get((pair.answer.prediction_id, row))
                if outcome is not None:
                    sides = pair.treatment, pair.champion
                    ours, theirs = (self._scored(side, row, outcome, quality) for side in sides)
                    yield ours - theirs

    def _scored(self, side: Predicted, row: int, outcome: Any, quality: Quality) -> float:
        value = None
        if row < len(side.rows):
            value = self._scorer.value(side.rows[row], outcome, side.version, quality)
        return self._scorer.worst(quality, side.version) if value is None else value


def covariate(unit: UnitRows, column: str) -> float | None:
    """Return a unit's covariate: the mean of an input over the rows of its first request. None if one is missing.

    No arm can change it: the features of the first request were known before any answer of the rollout to this unit.
    """
    values = unit.first.features.get(column) or [None]
    numbers = [
        float(value) for value in values if isinstance(value, int | float) and math.isfinite(float(value))
    ]
    return float(np.mean(numbers)) if len(numbers) == len(values) else None


def _is_inside(unit: UnitRows, segment: SegmentRule) -> bool:
    """Return whether a unit is in a segment, by the first row of its first request."""
    values = unit.first.features.get(segment.column)
    if not values:
        return False
    value = values[0]
    return (value if isinstance(value, str) else orjson.dumps(value).decode()) == segment.value


def _by_arm(values: Mapping[str, UnitValue], units: Units) -> dict[Arm, Moments]:
    moments = {}
    for arm in (Arm.treatment, Arm.control):
        of_arm = [value for name, value in values.items() if units[name].arm == arm]
        numbers, seconds = [one.value for one in of_arm], [one.second for one in of_arm]
        moments[arm] = Moments.of(numbers, seconds) if of_arm else Moments()
    return moments
