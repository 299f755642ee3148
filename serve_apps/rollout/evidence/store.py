"""The evidence of a rollout, as `cluster.statistics.verdict.judge` takes it."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.ledger.database import snapshot, updating
from cluster.records.edge_counts.database import (
    do_not_flush,
    ensure_tables,
    evidence_engine,
    updating_if_free,
    upsert,
)
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.planning import Plan
from cluster.statistics.policy import DAY_S, MAX_UNITS, REQUEST_EVENTS, Form, Policy, UnitEvent
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
from serve_apps.rollout.evidence.sizes import OF_ALL_STEPS, stored_units
from serve_apps.rollout.evidence.tables import (
    COUNTED,
    EVENTS,
    FILES,
    LIMITS,
    LOOKS,
    READERS,
    SIZES,
    UNITS,
    counted_rollouts,
    remove_batch,
    remove_rollout,
)
from serve_apps.rollout.json_form import as_json, from_json

SMALL_TABLES = (COUNTED, LIMITS, COHORTS, SUMS, SIZES, LOOKS, SHADOW_COUNTS)
"""Tables with a few rows of a rollout. They are removed at once."""
LARGE_TABLES = (EVENTS, UNITS, ENTERED)
"""Tables with a row for each unit. They are removed in batches, so that nobody waits long for their lock."""
BATCH = 10_000
ROWS_PER_S = 200_000.0
"""Rows that looks count in a second, on average. So a look at a million units is the last one's for five seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """What the edges must know to count a rollout's units."""

    slow_ms: float | None = None
    """An answer that takes longer counts as slow. None: only requests whose client gave up count as slow."""

    max_units: int = MAX_UNITS
    """How many units of each kind are stored for a step."""

    def __post_init__(self) -> None:
        if self.slow_ms is not None and not 0 < self.slow_ms < math.inf:
            raise ValueError(f"slow_ms must be a finite number above 0, got {self.slow_ms}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The current window of a rollout."""

    number: int
    """Number of windows that ended before it."""
    since: dt.datetime


def valid_seconds(rows: int) -> float:
    """Return for how long so many counted rows are not counted again; 0 if each look counts them."""
    valid_s = rows / ROWS_PER_S
    return valid_s if valid_s > 1 else 0.0


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _CountOf:
    """What is counted: units of a step, with events since the start of a window."""

    rollout: str
    below: int
    """The bound of the step's split."""
    since: dt.datetime | None
    """Start of the window; None if it is that of the step."""
    unit_watch_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Count:
    """Numbers of units at one moment."""

    watched: int
    events: Mapping[UnitEvent, EventCounts]
    until: float
    """Monotonic time until which the units are not counted again."""


class EvidenceStore:
    """The counts of all rollouts.

    Args:
        engine: The ledger's engine. The tables are created if they do not exist.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = evidence_engine(engine)
        self._counts: dict[str, tuple[_CountOf, _Count]] = {}
        ensure_tables(self._engine)

    def register(self, rollout_id: str, counting: Counting) -> None:
        """Let all edges count the units of a rollout. Call it before the event that starts the rollout.

        Idempotent. Other values replace the earlier ones for later requests.
        """
        with updating(self._engine) as connection:
            _register(connection, rollout_id, counting)

    def ensure_registered(self, rollout_id: str, counting: Counting, *, is_new: bool = False) -> None:
        """Let all edges count the units of a rollout, if it is not registered.

        A running rollout is missing only if the database was lost. Then all edges read their access files again from
        the beginning. So what was counted before is counted again, as long as its records still exist. Until then, no
        model has all its counts.

        Args:
            rollout_id: Id of the rollout.
            counting: How its units are counted.
            is_new: Nobody has registered it before, so nothing was lost, and no file is read again.
        """
        if rollout_id in self.counted():
            return
        with updating(self._engine) as connection:
            _register(connection, rollout_id, counting)
            if not is_new:
                # In the order in which an edge stores them, so that PostgreSQL sees no deadlock.
                connection.execute(READERS.delete())
                connection.execute(FILES.delete())

    def counted(self) -> set[str]:
        """Return the ids of the rollouts whose units are counted."""
        with self._engine.connect() as connection:
            return set(counted_rollouts(connection))

    def forget(self, rollout_id: str) -> bool:
        """Count a rollout no more, and remove a batch of its rows. Call it when the rollout has ended.

        Returns:
            Whether there may be more rows. Then call it again.
        """
        self._counts.pop(rollout_id, None)
        with updating(self._engine) as connection:
            remove_rollout(connection, rollout_id, SMALL_TABLES)
            removed = [remove_batch(connection, rollout_id, table, at_most=BATCH) for table in LARGE_TABLES]
        return max(removed) == BATCH

    def last_look(self, rollout_id: str) -> Evidence | None:
        """Return what `evidence` returned last, in any process; None if nobody has looked yet."""
        query = sa.select(LOOKS.c.evidence).where(LOOKS.c.rollout == rollout_id)
        with self._engine.connect() as connection:
            text = connection.execute(query).scalar_one_or_none()
        return None if text is None else from_json(Evidence, json.loads(text))

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
        """Return all counts of a rollout, and store them for `last_look`.

        A rollout of very many units is not counted at each look; see `ROWS_PER_S`. The last requests are always new.

        Args:
            rollout_id: Id of a registered rollout.
            plan: Its plan.
            step: Position of the step in the policy, from 0.
            step_started_at: Time of the event that began the step.
            started_at: Time of the event that started the rollout.
            now: Time of the look.
        """
        if plan.policy.is_shadow:
            evidence = self._evidence_of_shadow(rollout_id, plan, started_at=started_at, now=now)
        else:
            evidence = self._evidence_of_arms(
                rollout_id, plan, step=step, step_started_at=step_started_at, started_at=started_at, now=now
            )
        # A full disk or a held lock must not delay a verdict.
        with contextlib.suppress(sa.exc.OperationalError):
            self._store_look(rollout_id, evidence)
        return evidence

    def _evidence_of_arms(
        self,
        rollout_id: str,
        plan: Plan,
        *,
        step: int,
        step_started_at: dt.datetime,
        started_at: dt.datetime,
        now: dt.datetime,
    ) -> Evidence:
        """Return the counts of the treatment and its control."""
        window = current_window(
            plan, step=step, step_started_at=step_started_at, started_at=started_at, now=now
        )
        count_of = _CountOf(
            rollout=rollout_id,
            below=bounds(plan.policy.steps[step].weight).treatment_below,
            since=window.since if window.since > step_started_at else None,
            unit_watch_s=plan.policy.unit_watch_s,
        )
        with snapshot(self._engine) as connection:
            activities = self._activities(connection, rollout_id)
            count = self._count(connection, count_of, now)
            metrics = read_metrics(connection, rollout_id, paired=_paired(plan.policy))
            stored = stored_units(connection, rollout_id, count_of.below)
        last = [last_of_arm(activities, arm) for arm in (Arm.treatment, Arm.control)]
        waiting_since = min(_ms(started_at) if time is None else time for time in last)
        return Evidence(
            step=step,
            window=window.number,
            step_s=(now - step_started_at).total_seconds(),
            total_s=(now - started_at).total_seconds(),
            idle_s=max(0.0, (_ms(now) - waiting_since) / 1000),
            stored_units=stored,
            watched_units=count.watched,
            events=count.events,
            metrics=metrics,
            last=last_requests(activities),
        )

    def _count(self, connection: sa.Connection, of: _CountOf, now: dt.datetime) -> _Count:
        """Count the units of a rollout, or return the last numbers if they are still new enough."""
        before = self._counts.get(of.rollout)
        if before is not None and before[0] == of and time.monotonic() < before[1].until:
            return before[1]
        watched_until = now - dt.timedelta(seconds=of.unit_watch_s)
        watched = _count_units(connection, of, watched_until)
        events = _count_events(connection, of, watched_until)
        rows = watched + sum(one.treatment + one.control for one in events.values())
        count = _Count(watched=watched, events=events, until=time.monotonic() + valid_seconds(rows))
        self._counts[of.rollout] = (of, count)
        return count

    def _store_look(self, rollout_id: str, evidence: Evidence) -> None:
        values = {"evidence": json.dumps(as_json(evidence))}
        with updating_if_free(self._engine) as connection:
            do_not_flush(connection)
            insert = upsert(LOOKS, connection).values(rollout=rollout_id, **values)
            connection.execute(insert.on_conflict_do_update(index_elements=[LOOKS.c.rollout], set_=values))

    def _evidence_of_shadow(
        self, rollout_id: str, plan: Plan, *, started_at: dt.datetime, now: dt.datetime
    ) -> Evidence:
        """Return the counts of a shadow. It has one step, and one window that never ends."""
        with snapshot(self._engine) as connection:
            activities = self._activities(connection, rollout_id)
            counts = read_shadow_counts(connection, rollout_id)
            metrics = read_metrics(connection, rollout_id, paired=_paired(plan.policy), is_shadow=True)
            stored = stored_units(connection, rollout_id, OF_ALL_STEPS)
        last = last_of_arm(activities, Arm.outside)
        total_s = (now - started_at).total_seconds()
        idle_s = total_s if last is None else (_ms(now) - last) / 1000
        return Evidence(
            step=0,
            window=0,
            step_s=total_s,
            total_s=total_s,
            idle_s=max(0.0, idle_s),
            stored_units=stored,
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


def _register(connection: sa.Connection, rollout: str, counting: Counting) -> None:
    for table, values in (
        (COUNTED, {"slow_ms": counting.slow_ms}),
        (LIMITS, {"max_units": counting.max_units}),
    ):
        insert = upsert(table, connection).values(rollout=rollout, **values)
        connection.execute(insert.on_conflict_do_update(index_elements=[table.c.rollout], set_=values))


def _paired(policy: Policy) -> frozenset[str]:
    """Return the names of the paired metrics, and of their segments."""
    metrics = {metric.name for metric in policy.metrics if metric.form is Form.paired}
    return frozenset(metrics | {signal.name for signal in policy.signals if signal.metric in metrics})


def _count_units(connection: sa.Connection, of: _CountOf, until: dt.datetime) -> int:
    """Return how many units of the treatment had their first request in this step until a time."""
    of_step = (UNITS.c.rollout == of.rollout) & (UNITS.c.below == of.below) & (UNITS.c.first_ms <= _ms(until))
    return int(connection.execute(sa.select(sa.func.count()).select_from(UNITS).where(of_step)).scalar_one())


def _count_events(
    connection: sa.Connection, of: _CountOf, watched_until: dt.datetime
) -> Mapping[UnitEvent, EventCounts]:
    """Count units by their events.

    Args:
        connection: A transaction.
        of: What to count.
        watched_until: Units with a later first request are not watched yet.
    """
    of_step = (EVENTS.c.rollout == of.rollout) & (EVENTS.c.below == of.below)
    in_window = of_step if of.since is None else of_step & (EVENTS.c.last_ms >= _ms(of.since))
    by_arm = sa.select(EVENTS.c.event, EVENTS.c.arm, sa.func.count()).where(in_window)
    counts = {
        (event, arm): number
        for event, arm, number in connection.execute(by_arm.group_by(EVENTS.c.event, EVENTS.c.arm))
    }
    # A subquery and no join, so that also a planner without statistics of a new table takes the primary key.
    is_watched = (
        sa.select((UNITS.c.below == of.below) & (UNITS.c.first_ms <= _ms(watched_until)))
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
