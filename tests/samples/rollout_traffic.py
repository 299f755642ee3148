"""Simulated rollouts: units that come again, rates that drift, outcomes that come late. A hash makes the arms.

Times are in days. A run has five steps of a day, with 20 looks each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.statistics.mixtures import FloatArray
from cluster.statistics.moments import Moments
from cluster.statistics.policy import REQUEST_EVENTS, UnitEvent

WEIGHTS = (1.0, 5.0, 10.0, 25.0, 50.0)
LOOKS = 20
"""Number of looks at each step."""
NUM_LOOKS = LOOKS * len(WEIGHTS)
OUTCOME_WINDOW = 0.5
"""Time from a unit's first request until it enters a metric, in days."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """How a version behaves."""

    rates: Mapping[UnitEvent, float] = field(
        default_factory=lambda: {UnitEvent.failure: 0.002, UnitEvent.refusal: 0.01, UnitEvent.slow: 0.02}
    )
    """Probability of each event for one request of an average unit."""
    quality: float = 0.8
    """Share of right predictions."""
    cpu: float = 1.0
    """CPU time of a request, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """All counts of one run. Arms are the first axis: treatment, control. The last axis is the look."""

    events: Mapping[UnitEvent, FloatArray]
    """Units whose first event was in the window so far. The shape is [2, steps, LOOKS]."""
    quality: tuple[Moments, Moments]
    """Moments of the units' share of right predictions. Each field has NUM_LOOKS numbers."""
    cpu: tuple[Moments, Moments]
    units: FloatArray
    """Number of the treatment's units that came in the step so far. The shape is [steps, LOOKS]."""


def simulate(draw: np.random.Generator, treatment: Version, control: Version, *, units: int = 20_000) -> Look:
    """Return the counts of one run.

    Args:
        draw: Random numbers.
        treatment: The version of the treatment.
        control: The version of the control arm.
        units: Number of all units, in and outside the arms.
    """
    bucket = draw.integers(0, 10_000, units)
    is_control = bucket >= 5_000
    entry = np.searchsorted(
        np.array(WEIGHTS) * 100, np.where(is_control, 9_999 - bucket, bucket), side="right"
    )
    requests_a_day = draw.gamma(0.5, 6.0, units) + 0.2
    frailty = draw.gamma(2.0, 0.5, units)
    versions = [treatment, control]
    arms = is_control.astype(np.int64)
    requests = np.zeros((len(WEIGHTS), units), dtype=np.int64)
    for step, of_step in enumerate(requests):
        of_step[entry <= step] = draw.poisson(requests_a_day[entry <= step])
    events = {}
    for event in REQUEST_EVENTS:
        rate = np.array([version.rates[event] for version in versions])[arms] * frailty
        events[event] = _first_events(draw, rate, requests, arms)
    quality, cpu = _metrics(draw, requests, arms, versions)
    return Look(events=events, quality=quality, cpu=cpu, units=_arrivals(requests[:, arms == 0]))


def drift(step: int) -> float:
    """Return the factor of all rates on a day. It is the same for both arms."""
    return float(1 + 0.8 * np.sin(1.5 * step))


def _first_events(
    draw: np.random.Generator, rate: FloatArray, requests: np.ndarray, arms: np.ndarray
) -> FloatArray:
    counts = np.zeros((2, len(WEIGHTS), LOOKS))
    for step, of_step in enumerate(requests):
        active = np.flatnonzero(of_step)
        share = np.clip(rate[active] * drift(step), 1e-12, 1)
        number = draw.geometric(share)  # of the first request that has the event
        happened = number <= of_step[active]
        unit = active[happened]
        look = (number[happened] - draw.random(len(unit))) / of_step[unit] * LOOKS
        for arm in (0, 1):
            counts[arm, step] = np.bincount(look[arms[unit] == arm].astype(int), minlength=LOOKS)[:LOOKS]
    return counts.cumsum(-1)


def _arrivals(requests: np.ndarray) -> FloatArray:
    """Return how many units have come at each look of a step, if their first requests come evenly."""
    come = (requests > 0).sum(1)
    return np.asarray(np.floor(come[:, None] * np.arange(1, LOOKS + 1) / LOOKS), np.float64)


def _metrics(
    draw: np.random.Generator, requests: np.ndarray, arms: np.ndarray, versions: list[Version]
) -> tuple[tuple[Moments, Moments], tuple[Moments, Moments]]:
    """Return the moments of quality and CPU time at each look. A unit enters both when its outcome window is over."""
    seen = requests > 0
    first = np.where(seen.any(0), seen.argmax(0), 0)
    number = requests[first, np.arange(len(arms))]
    enters = np.where(number > 0, first + draw.random(len(arms)) + OUTCOME_WINDOW, np.inf)
    right = np.array([version.quality for version in versions])[arms] * (1 - 0.1 * np.sin(1.5 * first))
    right = np.clip(right + draw.normal(0, 0.05, len(arms)), 0, 1)
    quality = draw.binomial(number, right) / np.maximum(number, 1)
    cpu = np.array([version.cpu for version in versions])[arms] * number * draw.lognormal(0, 0.5, len(arms))
    look = np.minimum(enters * LOOKS, NUM_LOOKS).astype(int)
    return (
        _moments_by_arm(look, arms, quality, np.zeros(len(arms))),
        _moments_by_arm(look, arms, cpu, number.astype(np.float64)),
    )


def _moments_by_arm(
    look: np.ndarray, arms: np.ndarray, values: FloatArray, second: FloatArray
) -> tuple[Moments, Moments]:
    """Return the moments of treatment and control at each look."""
    cell = 2 * look + arms

    def sums(weights: FloatArray | None = None) -> FloatArray:
        """Return the sum of the units that have entered at each look, for both arms: [2, NUM_LOOKS]."""
        of_cells = np.bincount(cell, weights=weights, minlength=2 * NUM_LOOKS + 2)[: 2 * NUM_LOOKS]
        return np.asarray(of_cells.reshape(NUM_LOOKS, 2).T.cumsum(1), np.float64)

    units = sums()
    safe = np.maximum(units, 1)
    mean, second_mean = sums(values) / safe, sums(second) / safe
    squares = sums(values**2) - units * mean**2
    second_squares = sums(second**2) - units * second_mean**2
    products = sums(values * second) - units * mean * second_mean
    treatment, control = (
        Moments(
            units=units[arm],
            mean=mean[arm],
            squares=squares[arm],
            second_mean=second_mean[arm],
            second_squares=second_squares[arm],
            products=products[arm],
        )
        for arm in (0, 1)
    )
    return treatment, control
