"""Tables with the sums of a rollout's metrics, the units that have entered them, and the events of a shadow's units."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import asdict

import sqlalchemy as sa

from cluster.records.edge_counts.database import METADATA, upsert
from cluster.statistics.evidence import MetricCounts
from cluster.statistics.moments import Moments
from cluster.statistics.policy import MAX_UNITS
from cluster.statistics.sample_ratio import Split
from serve_apps.rollout.assignment import Arm
from serve_apps.rollout.evidence.sizes import OF_ALL_STEPS, Kind, add_sizes, size
from serve_apps.rollout.evidence.tables import counted_rollouts

EQUAL_ARMS = 0.5
"""Expected share of the treatment. Control has as many buckets at every weight of a policy."""
_PAGE = 500
COHORTS = sa.Table(
    "evidence_cohorts",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("next", sa.BigInteger, nullable=False),
)
"""The next cohort of each rollout."""
ENTERED = sa.Table(
    "evidence_entered",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("unit", sa.String(16), primary_key=True),
)
"""Units of the cohorts so far."""
SUMS = sa.Table(
    "evidence_sums",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("metric", sa.String(128), primary_key=True),
    sa.Column("arm", sa.String(16), primary_key=True),
    sa.Column("units", sa.BigInteger, nullable=False),
    *(
        sa.Column(name, sa.Double, nullable=False)
        for name in ("mean", "squares", "second_mean", "second_squares", "products")
    ),
)
ALL_UNITS = "units"
"""Stands for an event that each unit of a shadow has."""
SHADOW_COUNTS = sa.Table(
    "evidence_shadow_counts",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("event", sa.String(16), primary_key=True),
    sa.Column("units", sa.BigInteger, nullable=False),
)
"""Number of a shadow's units with each event."""
_FIELDS = ("units", "mean", "squares", "second_mean", "second_squares", "products")


class CohortResult(enum.Enum):
    """What `add_cohort` did with a cohort."""

    added = "added"
    full = "full"
    """The rollout has no room for its units, so none of them is stored."""
    already = "already"
    """It was taken before, so nothing was changed."""


def next_cohort(connection: sa.Connection, rollout: str) -> int:
    """Return the number of a rollout's next cohort, from 0."""
    query = sa.select(COHORTS.c.next).where(COHORTS.c.rollout == rollout)
    return int(connection.execute(query).scalar_one_or_none() or 0)


def known_units(connection: sa.Connection, rollout: str, units: list[str]) -> set[str]:
    """Return which of these units were in an earlier cohort."""
    known: set[str] = set()
    for start in range(0, len(units), _PAGE):
        query = sa.select(ENTERED.c.unit).where(
            ENTERED.c.rollout == rollout, ENTERED.c.unit.in_(units[start : start + _PAGE])
        )
        known.update(connection.execute(query).scalars())
    return known


def add_cohort(
    connection: sa.Connection,
    rollout: str,
    *,
    number: int,
    units: Collection[str],
    values: Mapping[str, Mapping[Arm, Moments]],
) -> CohortResult:
    """Add a cohort in the caller's transaction, if it is the next one.

    A cohort with which the rollout would have more than `max_units` units does not enter (`sizes`).

    Args:
        connection: A transaction.
        rollout: Id of the rollout.
        number: Number of the cohort.
        units: All units of the cohort.
        values: Sums over the units that entered each metric, by metric and arm.
    """
    if number:
        is_next = (COHORTS.c.rollout == rollout) & (COHORTS.c.next == number)
        claim = COHORTS.update().where(is_next).values(next=number + 1)
    else:
        claim = upsert(COHORTS, connection).values(rollout=rollout, next=1).on_conflict_do_nothing()
    if connection.execute(claim.returning(COHORTS.c.rollout)).first() is None:
        return CohortResult.already
    if units:
        if not _has_room(connection, rollout, len(units)):
            return CohortResult.full
        connection.execute(ENTERED.insert(), [{"rollout": rollout, "unit": unit} for unit in sorted(units)])
    stored = _sums(connection, rollout)
    for metric, by_arm in values.items():
        for arm, moments in by_arm.items():
            total = stored.get((metric, arm), Moments()).merge(moments)
            row = {name: float(value) for name, value in asdict(total).items()}
            row["units"] = int(total.units)
            insert = upsert(SUMS, connection).values(rollout=rollout, metric=metric, arm=arm, **row)
            keys = [SUMS.c.rollout, SUMS.c.metric, SUMS.c.arm]
            connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=row))
    return CohortResult.added


def _has_room(connection: sa.Connection, rollout: str, number: int) -> bool:
    """Return whether so many more units may enter. They are counted also if not, so that the rollout holds."""
    kind = Kind(rollout, OF_ALL_STEPS, "entered")
    counted = counted_rollouts(connection).get(rollout)
    max_units = MAX_UNITS if counted is None else counted.max_units
    add_sizes(connection, {kind: number})
    return size(connection, kind) <= max_units


def read_metrics(
    connection: sa.Connection,
    rollout: str,
    *,
    paired: Collection[str] = (),
    is_shadow: bool = False,
) -> dict[str, MetricCounts]:
    """Return what has entered each metric of a rollout.

    Args:
        connection: A transaction.
        rollout: Id of the rollout.
        paired: Metrics whose values are differences. Units of both arms have them.
        is_shadow: Whether there are no arms, and so no split.
    """
    stored = _sums(connection, rollout)
    counts = {}
    for metric in sorted({metric for metric, _ in stored}):
        treatment, control = (stored.get((metric, arm), Moments()) for arm in (Arm.treatment, Arm.control))
        split = Split(expected=EQUAL_ARMS, treatment=int(treatment.units), control=int(control.units))
        if metric in paired:
            treatment, control = treatment.merge(control), Moments()
        counts[metric] = MetricCounts(
            treatment=treatment, control=control, splits=() if is_shadow else (split,)
        )
    return counts


def add_shadow_counts(connection: sa.Connection, rollout: str, counts: Mapping[str, int]) -> None:
    """Add the counts of one cohort, in the caller's transaction."""
    for event, number in sorted(counts.items()):
        insert = upsert(SHADOW_COUNTS, connection).values(rollout=rollout, event=event, units=number)
        total = SHADOW_COUNTS.c.units + insert.excluded.units
        keys = [SHADOW_COUNTS.c.rollout, SHADOW_COUNTS.c.event]
        connection.execute(insert.on_conflict_do_update(index_elements=keys, set_={"units": total}))


def read_shadow_counts(connection: sa.Connection, rollout: str) -> dict[str, int]:
    """Return the number of a shadow's units with each event, and of all its units."""
    query = sa.select(SHADOW_COUNTS.c.event, SHADOW_COUNTS.c.units)
    return dict(connection.execute(query.where(SHADOW_COUNTS.c.rollout == rollout)).tuples().all())


def _sums(connection: sa.Connection, rollout: str) -> dict[tuple[str, str], Moments]:
    rows = connection.execute(sa.select(SUMS).where(SUMS.c.rollout == rollout)).mappings()
    return {(row["metric"], row["arm"]): Moments(**{name: row[name] for name in _FIELDS}) for row in rows}
