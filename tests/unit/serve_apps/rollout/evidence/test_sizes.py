"""Clients that invent units: the tables stay bounded, the rollout holds, and the counts stay right."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from cluster.statistics.policy import UnitEvent
from cluster.statistics.verdict import Verdict, judge
from serve_apps.rollout.evidence import metric_tables
from serve_apps.rollout.evidence import store as store_module
from serve_apps.rollout.evidence.metric_tables import ENTERED, CohortResult, add_cohort
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from serve_apps.rollout.evidence.tables import EVENTS, UNITS
from tests.samples.access_records import ROLLOUT_ID, line
from tests.samples.rollout_evidence import DAY, START_MS, Node, evidence, failures, the_plan

MAX = 10


@pytest.fixture
def limited(store: EvidenceStore) -> EvidenceStore:
    store.register(ROLLOUT_ID, Counting(slow_ms=100, max_units=MAX))
    return store


def num_rows(node: Node, table: sa.Table) -> int:
    with node.engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_tables_are_bounded_for_each_step(limited: EvidenceStore, node: Node) -> None:
    """Whatever the number of invented units; the next step has room again."""
    for turn in range(5):
        node.write(*(line(unit_hash=f"{unit:016}") for unit in range(turn * 7, turn * 7 + 7)))
        node.write(*(line(status=500, unit_hash=f"F{unit:015}") for unit in range(turn * 3, turn * 3 + 3)))
        node.restart() if turn == 2 else None
        node.reader.collect()
    assert (num_rows(node, UNITS), num_rows(node, EVENTS)) == (MAX, MAX)
    assert (evidence(limited).watched_units, evidence(limited).stored_units) == (MAX, MAX)
    node.write(*(line(below="5000", unit_hash=f"{unit:016}") for unit in range(MAX + 5)))
    node.reader.collect()
    second = evidence(limited, step=1)
    assert (second.watched_units, second.stored_units) == (MAX, MAX)
    assert num_rows(node, UNITS) <= 2 * MAX


def test_rollout_with_too_many_units_holds_and_still_rolls_back(limited: EvidenceStore, node: Node) -> None:
    """Stored units count with their later events, so a guardrail can still fire."""
    plan = the_plan(max_units=MAX)
    node.write(*(line(unit_hash=f"{unit:016}") for unit in range(MAX + 1)))
    node.reader.collect()
    decision = judge(plan, evidence(limited, plan=plan))
    assert decision.verdict is Verdict.hold
    assert decision.reasons == (f"too many units: {MAX} are stored, and no others are counted",)
    node.write(*(line(status=500, unit_hash=f"{unit:016}", ended_ms=START_MS + 1) for unit in range(MAX)))
    node.reader.collect()
    assert judge(plan, evidence(limited, plan=plan)).verdict is Verdict.roll_back


def test_events_of_stored_units_count_in_later_windows(limited: EvidenceStore, node: Node) -> None:
    """A unit that is stored already needs no room."""
    units = [f"{unit:016}" for unit in range(MAX)]
    node.write(*(line(status=500, unit_hash=unit) for unit in units))
    node.reader.collect()
    later = START_MS + 90_000_000
    node.write(*(line(status=500, unit_hash=unit, ended_ms=later) for unit in (*units, "B" * 16)))
    node.reader.collect()
    assert failures(limited, after=1.1 * DAY) == (MAX, 0)


def test_too_large_cohorts_do_not_enter_metrics(limited: EvidenceStore, node: Node) -> None:
    """The cohort counts as done, and the rollout holds."""
    added, full = CohortResult.added, CohortResult.full
    for number, (units, result) in enumerate(((MAX - 2, added), (5, full), (1, full))):
        names = [f"{number}{unit:015}" for unit in range(units)]
        with node.engine.begin() as connection:
            assert result is add_cohort(connection, ROLLOUT_ID, number=number, units=names, values={})
    assert num_rows(node, ENTERED) == MAX - 2
    assert evidence(limited).stored_units >= MAX
    with node.engine.connect() as connection:
        assert metric_tables.next_cohort(connection, ROLLOUT_ID) == 3


def test_ended_rollout_is_removed_in_batches(
    store: EvidenceStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call holds the lock for long, and nothing is counted from the first one on."""
    monkeypatch.setattr(store_module, "BATCH", 4)
    node.write(*(line(status=500, unit_hash=f"{unit:016}") for unit in range(10)))
    node.reader.collect()
    assert [store.forget(ROLLOUT_ID) for _ in range(4)] == [True, True, False, False]
    assert (num_rows(node, UNITS), num_rows(node, EVENTS)) == (0, 0)
    assert evidence(store).events[UnitEvent.failure].treatment == 0


def test_very_many_units_are_not_counted_at_each_look(
    store: EvidenceStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last requests are read each time. Another step is counted at once, and callers see the last look."""
    monkeypatch.setattr(store_module, "ROWS_PER_S", 0.01)
    assert store.last_look(ROLLOUT_ID) is None
    node.write(line(status=500))
    node.reader.collect()
    assert evidence(store).watched_units == 1
    node.write(line(status=500, unit_hash="B" * 16), line(below="5000", unit_hash="C" * 16))
    node.reader.collect()
    look = evidence(store)
    assert (look.watched_units, look.last.requests) == (1, 3)
    assert store.last_look(ROLLOUT_ID) == look
    assert evidence(store, step=1).watched_units == 1
