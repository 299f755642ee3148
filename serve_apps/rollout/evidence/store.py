"""The evidence of a rollout, as `cluster.statistics.verdict.judge` takes it."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.ledger.database import snapshot, updating
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.policy import DAY_S, REQUEST_EVENTS, Form, Policy, UnitEvent
from serve_apps.rollout.assignment import Arm, bounds
from serve_apps.rollout.evidence.activity import Activity, last_of_arm, last_requests
from serve_apps.rollout.evidence.collecting import activities_of
from serve_apps.rollout.evidence.metric_tables import (
    ALL_UNITS,
    COHORTS,
    ENTERED,
    SHADOW_COUNTS,
    SUMS,
    read_metrics,
    read_shadow_counts,
)
from serve_apps.rollout.evidence.tables import (
    COUNTED,
    EVENTS,
    READERS,
    UNITS,
    counted_rollouts,
    ensure_tables,
    evidence_engine,
    remove_rollout,
    upsert,
)

TABLES = (COUNTED, EVENTS, UNITS, COHORTS, ENTERED, SUMS, SHADOW_COUNTS)
"""Tables with rows of a rollout. They are removed with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """What the edges must know to count a rollout's units."""

    slow_ms: float | None = None
    """An answer that takes longer counts as slow. None: only requests whose client gave up count as slow."""

    def __post_init__(self) -> None:
        if self.slow_ms is not None and not 0 < self.slow_ms < math.inf:
            raise ValueError(f"slow_ms must be a finite number above 0, got {self.slow_ms}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The current window of a rollout."""

    number: int
    """Number of windows that ended before it."""
    since: dt.datetime


def current_window(
    plan: Plan, *, step: int, step_started_at: dt.datetime, started_at: dt.datetime, now: dt.datetime
) -> Window:
    """Return the current window. A window ends with its step, or after a day; the plan's last one never ends.

    Days are counted from the start of the rollout.
    """
    days = max(0, math.floor((now - started_at).total_seconds() / DAY_S))
    number = min(step + days, plan.num_windows - 1)
    day_started_at = started_at + dt.timedelta(seconds=max(0, number - step) * DAY_S)
    return Window(number=number, since=max(step_started_at, day_started_at))


class EvidenceStore:
    """The counts of all rollouts.

    Args:
        engine: The ledger's engine. The tables are created if they do not exist.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = evidence_engine(engine)
        ensure_tables(self._engine)

    def register(self, rollout_id: str, counting: Counting) -> None:
        """Let all edges count the units of a rollout. Call it before the event that starts the rollout.

        Idempotent. Other values replace the earlier ones for later requests.
        """
        values = {"slow_ms": counting.slow_ms}
        with updating(self._engine) as connection:
            insert = upsert(COUNTED, connection).values(rollout=rollout_id, **values)
            connection.execute(insert.on_conflict_do_update(index_elements=[COUNTED.c.rollout], set_=values))

    def ensure_registered(self, rollout_id: str, *, slow_ms: float | None) -> None:
        """Let all edges count the units of a running rollout, if it is not registered, for example in a new file.

        What was counted before is lost, so the units of the current step are counted from now on.
        """
        with self._engine.connect() as connection:
            is_registered = rollout_id in counted_rollouts(connection)
        if not is_registered:
            self.register(rollout_id, Counting(slow_ms=slow_ms))

    def forget(self, rollout_id: str) -> None:
        """Remove what was counted for a rollout, and count no more. Call it when the rollout has ended."""
        with updating(self._engine) as connection:
            remove_rollout(connection, rollout_id, TABLES)

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
        """Return all counts of a rollout at one moment.

        Args:
            rollout_id: Id of a registered rollout.
            plan: Its plan.
            step: Position of the step in the policy, from 0.
            step_started_at: Time of the event that began the step.
            started_at: Time of the event that started the rollout.
            now: Time of the look.
        """
        if plan.policy.is_shadow:
            return self._evidence_of_shadow(rollout_id, plan, started_at=started_at, now=now)
        window = current_window(
            plan, step=step, step_started_at=step_started_at, started_at=started_at, now=now
        )
        below = bounds(plan.policy.steps[step].weight).treatment_below
        watched_until = now - dt.timedelta(seconds=plan.policy.unit_watch_s)
        since = window.since if window.since > step_started_at else None
        with snapshot(self._engine) as connection:
            activities = self._activities(connection, rollout_id)
            units = _count_units(connection, rollout_id, below, watched_until)
            events = _count_events(connection, rollout_id, below, since, watched_until)
            metrics = read_metrics(connection, rollout_id, paired=_paired(plan.policy))
        last = [last_of_arm(activities, arm) for arm in (Arm.treatment, Arm.control)]
        waiting_since = min(_ms(started_at) if time is None else time for time in last)
        return Evidence(
            step=step,
            window=window.number,
            step_s=(now - step_started_at).total_seconds(),
            total_s=(now - started_at).total_seconds(),
            idle_s=max(0.0, (_ms(now) - waiting_since) / 1000),
            watched_units=units,
            events=events,
            metrics=metrics,
            last=last_requests(activities),
        )

    def _evidence_of_shadow(
        self, rollout_id: str, plan: Plan, *, started_at: dt.datetime, now: dt.datetime
    ) -> Evidence:
        """Return the counts of a shadow. It has one step, and one window that never ends."""
        with snapshot(self._engine) as connection:
            activities = self._activities(connection, rollout_id)
            counts = read_shadow_counts(connection, rollout_id)
            metrics = read_metrics(connection, rollout_id, paired=_paired(plan.policy), is_shadow=True)
        last = last_of_arm(activities, Arm.outside)
        total_s = (now - started_at).total_seconds()
        idle_s = total_s if last is None else (_ms(now) - last) / 1000
        return Evidence(
            step=0,
            window=0,
            step_s=total_s,
            total_s=total_s,
            idle_s=max(0.0, idle_s),
            watched_units=counts.get(ALL_UNITS, 0),
            events={event: EventCounts(watched=counts.get(event, 0)) for event in UnitEvent},
            metrics=metrics,
        )

    def requests(self, rollout_id: str) -> dict[str, int]:
        """Return the number of a rollout's requests at all edges, by arm. `none` has those without a unit."""
        totals: dict[str, int] = {}
        with self._engine.connect() as connection:
            for activity in self._activities(connection, rollout_id):
                for arm, number in activity.requests.items():
                    totals[arm] = totals.get(arm, 0) + number
        return totals

    @staticmethod
    def _activities(connection: sa.Connection, rollout_id: str) -> list[Activity]:
        """Return what each edge saw of a rollout."""
        texts = connection.execute(sa.select(READERS.c.activities)).scalars()
        found = (activities_of(text).get(rollout_id) for text in texts)
        return [activity for activity in found if activity is not None]


def _paired(policy: Policy) -> frozenset[str]:
    """Return the names of the paired metrics, and of their segments."""
    metrics = {metric.name for metric in policy.metrics if metric.form is Form.paired}
    return frozenset(metrics | {signal.name for signal in policy.signals if signal.metric in metrics})


def _count_units(connection: sa.Connection, rollout: str, below: int, until: dt.datetime) -> int:
    """Return how many units of the treatment had their first request in this step until a time."""
    of_step = (UNITS.c.rollout == rollout) & (UNITS.c.below == below) & (UNITS.c.first_ms <= _ms(until))
    return int(connection.execute(sa.select(sa.func.count()).select_from(UNITS).where(of_step)).scalar_one())


def _count_events(
    connection: sa.Connection,
    rollout: str,
    below: int,
    since: dt.datetime | None,
    watched_until: dt.datetime,
) -> Mapping[UnitEvent, EventCounts]:
    """Count units by their events.

    Args:
        connection: A transaction.
        rollout: Id of the rollout.
        below: The bound of the step's split.
        since: Start of the window; None if it is that of the step.
        watched_until: Units with a later first request are not watched yet.
    """
    of_step = (EVENTS.c.rollout == rollout) & (EVENTS.c.below == below)
    in_window = of_step if since is None else of_step & (EVENTS.c.last_ms >= _ms(since))
    by_arm = sa.select(EVENTS.c.event, EVENTS.c.arm, sa.func.count()).where(in_window)
    counts = {
        (event, arm): number
        for event, arm, number in connection.execute(by_arm.group_by(EVENTS.c.event, EVENTS.c.arm))
    }
    # A subquery and no join, so that also a planner without statistics of a new table takes the primary key.
    is_watched = (
        sa.select((UNITS.c.below == below) & (UNITS.c.first_ms <= _ms(watched_until)))
        .where(UNITS.c.rollout == EVENTS.c.rollout, UNITS.c.unit == EVENTS.c.unit)
        .scalar_subquery()
    )
    of_treatment = sa.select(EVENTS.c.event, sa.func.count()).where(of_step, EVENTS.c.arm == Arm.treatment)
    by_event = of_treatment.where(is_watched).group_by(EVENTS.c.event)
    watched: dict[str, int] = dict(connection.execute(by_event).tuples().all())
    return {
        event: EventCounts(
            treatment=counts.get((event, Arm.treatment), 0),
            control=counts.get((event, Arm.control), 0),
            watched=watched.get(event, 0),
        )
        for event in REQUEST_EVENTS
    }


def _ms(time: dt.datetime) -> int:
    return round(time.timestamp() * 1000)
