"""Error rates and power of the rollout statistics, by simulation. Tests and `make bench` use the same functions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np

from cluster.statistics.breaker import LastRequests, is_open
from cluster.statistics.coin import is_harm
from cluster.statistics.comparisons import improvement, is_reached, is_worse
from cluster.statistics.effects import adjusted_difference, difference_of_means
from cluster.statistics.evidence import EventCounts, Evidence, MetricCounts
from cluster.statistics.mixtures import FloatArray
from cluster.statistics.moments import Moments
from cluster.statistics.no_harm import is_above_limit, is_no_harm
from cluster.statistics.planning import Baseline, Plan, Traffic, plan
from cluster.statistics.policy import (
    DAY_S,
    Better,
    EventGuardrail,
    Form,
    Goal,
    GoalKind,
    Margin,
    Metric,
    MetricGuardrail,
    Policy,
    Step,
    UnitEvent,
)
from cluster.statistics.sample_ratio import Split, log_evidence_of_mismatch
from cluster.statistics.sequences import tuning
from tests.samples.rollout_traffic import LOOKS, NUM_LOOKS, WEIGHTS, Look, Version, simulate

QUALITY = Metric(name="quality")
CPU = Metric(name="cpu", form=Form.ratio, better=Better.low)
GOAL = Goal(metric="quality", kind=GoalKind.superiority, expected=0.03)
POLICY = Policy(
    steps=tuple(Step(weight=weight, bake_s=DAY_S / 2) for weight in WEIGHTS),
    metrics=(QUALITY, CPU),
    goals=(GOAL,),
    event_guardrails=(
        EventGuardrail(event=UnitEvent.failure, limit=0.05),
        EventGuardrail(event=UnitEvent.refusal, limit=0.2),
        EventGuardrail(event=UnitEvent.slow, limit=0.3),
    ),
    metric_guardrails=(
        MetricGuardrail(metric="quality"),
        MetricGuardrail(metric="cpu", margin=Margin(size=0.1, is_relative=True)),
    ),
    deadline_s=7 * DAY_S,
)
"""A policy with five guardrails, whose windows are five steps, seven days, and a day after the promotion."""
TRAFFIC = Traffic(
    units_per_hour=20_000,
    events={UnitEvent.failure: 0.01, UnitEvent.refusal: 0.05, UnitEvent.slow: 0.1},
    metrics={"quality": Baseline(mean=0.8, deviation=0.35), "cpu": Baseline(mean=1.1, deviation=1.2)},
)


@cache
def the_plan() -> Plan:
    """Return the plan of `POLICY`."""
    return plan(POLICY, TRAFFIC)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of the runs in which something was found at any look."""

    goal: float
    rollback: float
    z_test: float
    """A two-sided z-test at each look, with an error of 5 % and at least 100 units an arm."""


def rollouts(draw: np.random.Generator, treatment: Version, control: Version, *, runs: int) -> Rates:
    """Simulate whole rollouts, and return how often the goal is reached and a guardrail rolls back."""
    found = np.array([_found(simulate(draw, treatment, control)) for _ in range(runs)])
    goal, rollback, z_test = found.mean(0)
    return Rates(goal=goal, rollback=rollback, z_test=z_test)


def _found(look: Look) -> tuple[bool, bool, bool]:
    goal, rolled_back = look_by_look(look)
    counts = MetricCounts(treatment=look.quality[0], control=look.quality[1])
    effect = improvement(QUALITY, counts, tolerated=Margin())
    known = effect.smallest_arm >= 100
    z_test = known & (np.abs(effect.estimate) > 1.96 * effect.standard_error)
    return bool(goal.any()), bool(rolled_back.any()), bool(z_test.any())


def look_by_look(look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Return at which looks the goal is reached, and at which a guardrail rolls back."""
    the = the_plan()
    quality = MetricCounts(treatment=look.quality[0], control=look.quality[1])
    cpu = MetricCounts(treatment=look.cpu[0], control=look.cpu[1])
    variance = the.goal_tunings["quality"]
    goal = is_reached(GOAL, QUALITY, quality, error=POLICY.errors.goals, variance=variance)
    harm = np.zeros(NUM_LOOKS, dtype=bool)
    for rule, metric, counts in zip(POLICY.metric_guardrails, (QUALITY, CPU), (quality, cpu), strict=True):
        harm |= is_worse(
            metric, counts, tolerated=rule.margin, error=the.guardrail_error, variance=the.guardrail_tuning
        )
    errors = [the.window_error(step) for step in range(len(WEIGHTS))]
    for guardrail in POLICY.event_guardrails:
        treatment, control = look.events[guardrail.event]
        harm |= np.concatenate(
            [
                is_harm(treatment[step], control[step], ratio=guardrail.ratio, error=error)
                for step, error in enumerate(errors)
            ]
        )
    return goal, harm


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How often, and after how many units of an arm, something was found."""

    found: float
    mean_units: float
    """Over the runs in which it was found."""
    units_99: float
    """Number of units after which 99 % of all runs have found it; infinite if fewer do."""


def detection(hits: np.ndarray, units: np.ndarray) -> Detection:
    """Return when the first hit of each run was. The shape of `hits` is [runs, looks]."""
    found = hits.any(1)
    first = np.where(found, units[hits.argmax(1)], np.inf)
    return Detection(
        found=float(found.mean()),
        mean_units=float(first[found].mean()) if found.any() else np.inf,
        units_99=float(np.quantile(first, 0.99, method="higher")),
    )


def superiority(draw: np.random.Generator, *, runs: int, treatment: float, control: float) -> Detection:
    """Return when a better share is found, in 100 looks up to 20,000 units an arm."""
    units = np.arange(200, 20_001, 200)

    def arm(share: float) -> Moments:
        mean = draw.binomial(200, share, (runs, len(units))).cumsum(1) / units
        return Moments(
            units=np.broadcast_to(units, mean.shape).astype(float),
            mean=mean,
            squares=units * mean * (1 - mean),
        )

    counts = MetricCounts(treatment=arm(treatment), control=arm(control))
    variance = the_plan().goal_tunings["quality"]
    reached = is_reached(GOAL, QUALITY, counts, error=POLICY.errors.goals, variance=variance)
    return detection(reached, units)


def failing_share(
    draw: np.random.Generator,
    *,
    runs: int,
    treatment: float,
    control: float,
    ratio: float = 1.0,
    units: int = 2_000,
    window: int = 0,
) -> Detection:
    """Return when the coin test finds that more units fail in the treatment. It looks after each unit.

    Args:
        draw: Random numbers.
        runs: Number of runs.
        treatment: Share of the treatment's units that fail.
        control: Share of the control's units that fail.
        ratio: Rate ratio that the guardrail tolerates.
        units: Greatest number of units of each arm.
        window: Window of the plan, whose error is used.
    """
    is_treatment = draw.random((runs, 2 * units)) < 0.5
    fails = draw.random((runs, 2 * units)) < np.where(is_treatment, treatment, control)
    ours, theirs = (fails & is_treatment).cumsum(1), (fails & ~is_treatment).cumsum(1)
    harm = np.zeros(fails.shape, dtype=bool)
    harm[fails] = is_harm(ours[fails], theirs[fails], ratio=ratio, error=the_plan().window_error(window))
    found = harm.any(1)
    first = np.where(found, is_treatment.cumsum(1)[np.arange(runs), harm.argmax(1)], np.inf)
    return Detection(
        found=float(found.mean()),
        mean_units=float(first[found].mean()) if found.any() else np.inf,
        units_99=float(np.quantile(first, 0.99, method="higher")),
    )


def late_harm(draw: np.random.Generator, *, runs: int, units: int = 500, with_windows: bool = True) -> float:
    """Return how often harm is found that begins with a unit's 200th request.

    Each unit sends 50 requests a day for eight days. 1 % of them fail; from a unit's 200th request on, 4 % of the
    treatment's. Without windows, a unit counts once in the whole rollout, and the first window has the whole error.
    """
    the, found = the_plan(), np.zeros(runs, dtype=bool)
    days, a_day = 8, 50
    rate = np.stack([np.full(days, 0.01), np.full(days, 0.01)])
    rate[0, 200 // a_day :] = 0.04
    fails = draw.random((runs, 2, units, days)) < (1 - (1 - rate) ** a_day)[:, None, :]
    if with_windows:
        counts = fails.sum(2)
        for day in range(days):
            found |= is_harm(counts[:, 0, day], counts[:, 1, day], ratio=1, error=the.window_error(day))
        return float(found.mean())
    first = fails & (fails.cumsum(3) == 1)
    counts = first.sum(2).cumsum(2)
    return float(is_harm(counts[:, 0], counts[:, 1], ratio=1, error=the.guardrail_error).any(1).mean())


def mismatch(draw: np.random.Generator, *, runs: int, share: float, ramping: bool = False) -> Detection:
    """Return when a mismatch is found, in 100 looks up to 30,000 units of both arms together.

    Args:
        draw: Random numbers.
        runs: Number of runs.
        share: Share of the units that enter for the treatment, of those that should enter in equal parts.
        ramping: The expected share is 1/2 only at the last of five steps.
    """
    looks, a_look = NUM_LOOKS, 300
    step = np.arange(looks) // (looks // len(WEIGHTS))
    expected = np.array([0.2, 0.3, 0.4, 0.45, 0.5]) if ramping else np.full(len(WEIGHTS), 0.5)
    odds = expected / (1 - expected) * share / (1 - share)
    ours = draw.binomial(a_look, (odds / (1 + odds))[step], (runs, looks))
    sums = np.zeros((2, runs, looks, len(WEIGHTS)))
    for number in range(len(WEIGHTS)):
        sums[0, :, :, number] = (ours * (step == number)).cumsum(1)
        sums[1, :, :, number] = ((a_look - ours) * (step == number)).cumsum(1)
    hits = log_evidence_of_mismatch(sums[0], sums[1], expected) >= -np.log(POLICY.errors.mismatch)
    return detection(hits, np.arange(a_look, looks * a_look + 1, a_look))


def false_no_harm(draw: np.random.Generator, *, runs: int, share: float, limit: float) -> float:
    """Return how often `no_harm` is concluded at any of 100 looks up to 20,000 units."""
    units = np.arange(200, 20_001, 200)
    failing = draw.binomial(200, share, (runs, len(units))).cumsum(1)
    concluded = is_no_harm(failing, units, planned_units=200, limit=limit, error=POLICY.errors.no_harm)
    return float(concluded.any(1).mean())


def requests_until_break(draw: np.random.Generator, *, runs: int, units: int = 30) -> FloatArray:
    """Return, for each run, the number of failed requests of the treatment until the breaker fires.

    All requests of the treatment fail, and 1 % of the champion's. Both arms get requests of random units equally often.
    """
    needed = np.full(runs, np.inf)
    for run in range(runs):
        is_treatment = draw.random(400) < 0.5
        unit = draw.integers(0, units, 400)
        champion_fails = draw.random(400) < 0.01
        positions = np.flatnonzero(is_treatment)
        for number in range(20, len(positions) + 1):
            begin, end = positions[number - 20], positions[number - 1] + 1
            of_champion = ~is_treatment[begin:end]
            last = LastRequests(
                requests=20,
                failures=20,
                units=len(set(unit[positions[number - 20 : number]].tolist())),
                champion_requests=int(of_champion.sum()),
                champion_failures=int((champion_fails[begin:end] & of_champion).sum()),
            )
            if is_open(last):
                needed[run] = number
                break
    return needed


def spread_of_cuped(draw: np.random.Generator, *, runs: int) -> tuple[float, float]:
    """Return the variance of an adjusted difference relative to the plain one, and that which its standard error says.

    The covariate explains three quarters of a value's variance.
    """
    covariate = draw.normal(5, 1, (2, runs, 400))
    values = covariate * np.sqrt(3) + draw.normal(0, 1, covariate.shape)
    arms = [Moments.of(values[arm], covariate[arm]) for arm in (0, 1)]
    plain, adjusted = difference_of_means(*arms), adjusted_difference(*arms)
    said = float((adjusted.standard_error**2).mean() / plain.estimate.var())
    return float(adjusted.estimate.var() / plain.estimate.var()), said


def goal_by_form(draw: np.random.Generator, *, form: Form, runs: int, effect: float = 0.0) -> Detection:
    """Return when superiority is found in a metric of this form, in 100 looks up to 5,000 units an arm.

    A unit has a gamma-distributed size, which is its covariate and its denominator. Its value is the size plus noise,
    and in the treatment the effect, too.
    """
    looks, batch = NUM_LOOKS, 50
    metric = Metric(name="value", form=form)
    variance = tuning(looks * batch, error=POLICY.errors.goals)
    goal = Goal(metric="value", kind=GoalKind.superiority)
    hits = np.zeros((runs, looks), dtype=bool)
    arms = [Moments(), Moments()]
    for look in range(looks):
        size = draw.gamma(2.0, 1.0, (2, runs, batch))
        values = size + draw.normal(0, 0.5, size.shape)
        values[0] += effect * (size[0] if form is Form.ratio else 1)
        if form is Form.paired:
            added = [Moments.of(draw.normal(effect, 0.5, (runs, batch))), Moments()]
        else:
            added = [Moments.of(values[arm], size[arm]) for arm in (0, 1)]
        arms = [arm.merge(more) for arm, more in zip(arms, added, strict=True)]
        counts = MetricCounts(treatment=arms[0], control=arms[1])
        hits[:, look] = is_reached(goal, metric, counts, error=POLICY.errors.goals, variance=variance)
    return detection(hits, batch * np.arange(1, looks + 1))


def false_signal(draw: np.random.Generator, *, runs: int, segments: int = 4) -> float:
    """Return how often any of the signals of equal segments holds, in 100 looks up to 2,000 units an arm of each.

    Each segment's values have another variance, and they are skewed.
    """
    looks, batch = NUM_LOOKS, 20
    error = POLICY.errors.signals / segments
    metric, variance = Metric(name="value"), tuning(2 * looks * batch, error=error)
    held = np.zeros(runs, dtype=bool)
    for segment in range(segments):
        values = draw.exponential(1 + segment, (2, runs, looks, batch))
        arms = [_running(values[arm]) for arm in (0, 1)]
        counts = MetricCounts(treatment=arms[0], control=arms[1])
        held |= is_worse(metric, counts, tolerated=Margin(), error=error, variance=variance).any(1)
    return float(held.mean())


def _running(values: np.ndarray) -> Moments:
    """Return the sums over all batches until each look, of values of the shape [runs, looks, units of a batch]."""
    units = values.shape[2] * np.arange(1, values.shape[1] + 1)
    mean = values.sum(2).cumsum(1) / units
    squares = (values**2).sum(2).cumsum(1) - units * mean**2
    return Moments(units=np.broadcast_to(units, mean.shape).astype(float), mean=mean, squares=squares)


def share_above_limit(draw: np.random.Generator, *, runs: int, share: float, limit: float) -> Detection:
    """Return when a shadow's failing share is found to be above its limit, in 100 looks up to 5,000 units."""
    units = np.arange(50, 5_001, 50)
    failing = draw.binomial(50, share, (runs, len(units))).cumsum(1)
    error = POLICY.errors.guardrails / 4
    return detection(is_above_limit(failing, units, limit=limit, error=error), units)


def evidence_at(look: Look, number: int) -> Evidence:
    """Return all counts of a simulated run at one look, as a controller would give them to `judge`."""
    step, in_step = divmod(number, LOOKS)
    events = {}
    for event, counts in look.events.items():
        ours, theirs = (int(counts[arm, step, in_step]) for arm in (0, 1))
        events[event] = EventCounts(treatment=ours, control=theirs, watched=ours)
    metrics = {}
    for name, arms in (("quality", look.quality), ("cpu", look.cpu)):
        treatment, control = (
            Moments(**{field.name: float(getattr(arm, field.name)[number]) for field in fields(arm)})
            for arm in arms
        )
        splits = (Split(expected=0.5, treatment=int(treatment.units), control=int(control.units)),)
        metrics[name] = MetricCounts(treatment=treatment, control=control, splits=splits)
    return Evidence(
        step=step,
        window=step,
        step_s=(in_step + 1) * DAY_S / LOOKS,
        total_s=(number + 1) * DAY_S / LOOKS,
        watched_units=int(look.units[step, in_step]),
        events=events,
        metrics=metrics,
    )
