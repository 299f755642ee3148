"""A replay counts the units of a decision again from the access files, and names the first count that differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.evidence import store as store_module
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from serve_apps.rollout.recounting.access_logs import AccessLogs, Moment
from serve_apps.rollout.recounting.figures import first_other_figure
from tests.samples.access_records import ROLLOUT_ID, line
from tests.samples.rollout_evidence import DAY, START, START_MS, Node, evidence, the_plan


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(Ledger(f"sqlite:///{tmp_path}/ledger.db"), tmp_path / "access")


def write(node: Node, *, hours: float) -> None:
    """Write requests of 60 units over a step and a day: failures, refusals, slow answers, and broken lines."""
    lines = []
    for number in range(min(240, int(hours * 6) + 1)):
        status = (200, 500, 404)[number % 7 % 3]
        arm = ("treatment", "control")[number % 60 % 2]
        ended_ms = START_MS + number * 600_000
        fields = {"latency_ms": 400 if number % 11 == 0 else 3, "below": "2000" if number < 200 else "5000"}
        lines.append(line(unit_hash=f"U{number % 60}", status=status, arm=arm, ended_ms=ended_ms, **fields))
    node.write(*lines[::2])
    node.write(*lines[1::2], b"no record\n", name="20270115T090000-b.jsonl")


def moment(counts: Evidence) -> Moment:
    return Moment(plan=the_plan(), weight=20, started_at=START, step_started_at=START, evidence=counts)


def counted(store: EvidenceStore, hours: float) -> Evidence:
    """Return what the store says at a time."""
    return evidence(store, after=DAY * hours / 24, step_started_at=START, started_at=START, plan=the_plan())


@pytest.mark.parametrize("hours", [21.9, 30.0])
def test_counts_of_the_files_are_those_of_the_store(node: Node, hours: float) -> None:
    """In the first window, and in the next day's, which counts other events of the same units."""
    store = EvidenceStore(node.ledger_engine)
    store.register(ROLLOUT_ID, Counting(slow_ms=100))
    write(node, hours=hours)
    node.reader.collect()
    logs = AccessLogs(node.folder, lag_s=0)
    logs.start(ROLLOUT_ID, slow_ms=100)
    found = counted(store, hours)
    assert found.events[UnitEvent.failure].treatment > 0
    assert logs.first_difference(ROLLOUT_ID, moment(found)) is None
    changed = replace(found.events[UnitEvent.refusal], control=found.events[UnitEvent.refusal].control + 1)
    other = replace(found, events={**found.events, UnitEvent.refusal: changed})
    difference = logs.first_difference(ROLLOUT_ID, moment(other))
    assert difference is not None
    assert difference[:2] == ("events.refusal.control", changed.control)


def test_count_may_be_behind_the_files_by_the_lag_only(node: Node) -> None:
    """The readers of the edges need some time."""
    node.write(*(line(unit_hash=f"U{n}", status=500, ended_ms=START_MS + 1000 * n) for n in range(10)))
    for failing, lag_s, is_equal in ((10, 0, True), (7, 0, False), (7, 5, True), (3, 5, False)):
        logs = AccessLogs(node.folder, lag_s=lag_s)
        logs.start(ROLLOUT_ID, slow_ms=None)
        counts = Evidence(
            step=0,
            window=0,
            step_s=9,
            total_s=9,
            watched_units=failing,
            events={UnitEvent.failure: EventCounts(treatment=failing, watched=failing)},
        )
        difference = logs.first_difference(ROLLOUT_ID, moment(counts))
        assert (difference is None) is is_equal, difference


def ten_failures(failing: int, **changes: int) -> Evidence:
    """Return counts nine seconds after the first of ten failures, one a second."""
    failures = {UnitEvent.failure: EventCounts(treatment=failing, watched=failing)}
    return Evidence(step=0, window=0, step_s=9, total_s=9, watched_units=failing, events=failures, **changes)


def test_full_rollout_has_only_an_upper_bound(node: Node) -> None:
    """With `max_units` stored units, the store counts no others."""
    node.write(*(line(unit_hash=f"U{n}", status=500, ended_ms=START_MS + 1000 * n) for n in range(10)))
    logs = AccessLogs(node.folder, lag_s=0)
    logs.start(ROLLOUT_ID, slow_ms=None)
    for failing, stored, is_equal in ((4, 4, True), (4, 3, False), (11, 11, False)):
        look = replace(moment(ten_failures(failing, stored_units=stored)), plan=the_plan(max_units=4))
        assert (logs.first_difference(ROLLOUT_ID, look) is None) is is_equal


def test_counts_of_very_many_units_may_be_old(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the store counts: 14 rows are valid for 3.5 seconds here. A look at few rows may follow."""
    monkeypatch.setattr(store_module, "ROWS_PER_S", 4.0)
    node.write(*(line(unit_hash=f"U{n}", status=500, ended_ms=START_MS + 1000 * n) for n in range(10)))
    logs = AccessLogs(node.folder, lag_s=0)
    logs.start(ROLLOUT_ID, slow_ms=None)
    for failing, is_equal in ((10, True), (7, True), (4, False), (7, True)):
        assert (logs.first_difference(ROLLOUT_ID, moment(ten_failures(failing))) is None) is is_equal


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    """Nothing would be compared."""
    with pytest.raises(ConfigError, match="has no access file"):
        AccessLogs(tmp_path, lag_s=0)


@pytest.mark.parametrize(
    ("recorded", "computed", "difference"),
    [
        ("units: 5 of 277", "units: 5 of 277", None),
        ("units: 6 of 277", "units: 5 of 277", ("6", "5")),
        ("limit 5.000%, 1,204 units", "limit 5.000%, 1,205 units", ("1,204", "1,205")),
        ("improvement 0.0014 ± 3.5e-05", "improvement 0.0015 ± 3.5e-05", None),  # the last place
        ("improvement 0.0014 ± 3.5e-05", "improvement 0.0014 ± 3.9e-05", ("3.5e-05", "3.9e-05")),
        ("breaker: no", "breaker: the last 20 failed", None),  # another release's words
    ],
)
def test_figures_of_reasons_are_compared(
    recorded: str, computed: str, difference: tuple[str, str] | None
) -> None:
    """Another release of SciPy may compute another last digit."""
    assert first_other_figure(recorded, computed) == difference
