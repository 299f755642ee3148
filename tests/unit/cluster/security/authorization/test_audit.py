"""Recorded decisions: denials, the number of unauthenticated requests, and a reproducible sample of permissions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger.events import AccessDecided, DenialsCounted, LedgerEvent, StrangersRefused
from cluster.security.authorization.audit import (
    OTHER_REASONS,
    UNAUTHENTICATED_ACTOR,
    DecisionRecorder,
    is_sampled,
)
from cluster.security.authorization.denials import MAX_EVENTS_PER_ACTION, MAX_EVENTS_PER_RESOURCE, MAX_TRACKED
from cluster.security.authorization.policy import Action, Decision, Resource
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role

DENIED = Decision(allowed=False, policies=("four-eyes",))
ALLOWED = Decision(allowed=True, policies=("admin-manages",))
MODEL = Resource(kind="model", name="loan", column_class="internal")


class Records(list[LedgerEvent]):
    """Collects appended events and their actors."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: list[str] = []

    def write(self, event: LedgerEvent, *, actor: str) -> None:
        self.append(event)
        self.actors.append(actor)


def recorder(**settings: Any) -> tuple[Records, DecisionRecorder]:
    """Return a recorder with these settings, and what it records."""
    records = Records()
    return records, DecisionRecorder(records.write, **settings)


def who(subject: str = "alice") -> Principal:
    return Principal(subject=subject, role=Role.admin, purpose="credit", expires_at=0, tenant="north")


def test_denial_is_recorded_with_all_details() -> None:
    """The event contains principal, action, resource and policies."""
    records, decisions = recorder(permit_rate=0.0)
    for at in (10.0, 10.0, 11.0):
        decisions.record_decision(who(), Action.deploy, MODEL, DENIED, at=at)
    assert len(records) == 3
    who_and_why = {"role": "admin", "purpose": "credit", "tenant": "north", "entrypoint": ""}
    what = {"action": "deploy", "kind": "model", "resource": "loan", "column_class": "internal"}
    assert records[0] == AccessDecided(allowed=False, policies=["four-eyes"], **who_and_why, **what)
    assert records.actors == ["alice"] * 3


def test_repeated_denials_are_counted() -> None:
    """The count is recorded when the window ends. The next window starts with single events again, and other resources
    have their own limit."""
    records, decisions = recorder(window_s=60)
    for at in range(50):
        decisions.record_decision(who(), Action.deploy, MODEL, DENIED, at=float(at))
    assert [type(record) for record in records] == [AccessDecided] * MAX_EVENTS_PER_RESOURCE
    decisions.record_decision(who(), Action.deploy, replace(MODEL, name="other"), DENIED, at=59.0)
    decisions.record_decision(who(), Action.deploy, MODEL, DENIED, at=60.0)
    later = [type(record) for record in records[MAX_EVENTS_PER_RESOURCE:]]
    assert later == [AccessDecided, DenialsCounted, AccessDecided]
    first = MAX_EVENTS_PER_RESOURCE
    assert records[-2] == DenialsCounted(
        tenant="north", action="deploy", count=50 - first, first_at=float(first), last_at=49.0
    )
    assert set(records.actors) == {"alice"}


@pytest.mark.parametrize(("subjects", "each"), [(1, 500), (3, 200), (MAX_TRACKED + 10, 1)])
def test_many_denials_give_few_events_and_a_full_count(subjects: int, each: int) -> None:
    """Holds for many principals and for many resource names."""
    records, decisions = recorder()
    for number in range(each):
        for subject in range(subjects):
            resource = replace(MODEL, name=f"m{number}")
            decisions.record_decision(who(str(subject)), Action.deploy, resource, DENIED, at=1.0)
    whole = sum(isinstance(record, AccessDecided) for record in records)
    assert whole == min(each, MAX_EVENTS_PER_ACTION) * subjects
    decisions.flush()
    counted = sum(record.count for record in records if isinstance(record, DenialsCounted))
    assert whole + counted == each * subjects


def test_unauthenticated_requests_are_counted_per_window_and_reason() -> None:
    """The counts are recorded when the window ends."""
    records, decisions = recorder(window_s=60)
    for at in (0.0, 30.0, 59.0):
        decisions.count_unauthenticated("expired", at=at)
    decisions.count_unauthenticated("no token", at=31.0)
    assert records == []
    decisions.count_unauthenticated("expired", at=60.0)
    assert records == [
        StrangersRefused(reason="expired", count=3, first_at=0.0, last_at=59.0),
        StrangersRefused(reason="no token", count=1, first_at=31.0, last_at=31.0),
    ]
    decisions.flush()
    assert records[2:] == [StrangersRefused(reason="expired", count=1, first_at=60.0, last_at=60.0)]
    decisions.flush()
    assert len(records) == 3
    assert set(records.actors) == {UNAUTHENTICATED_ACTOR}


def test_decision_of_a_known_principal_also_ends_a_window() -> None:
    """Its event follows the counts of the previous window."""
    records, decisions = recorder(permit_rate=0.0)
    decisions.count_unauthenticated("expired", at=1.0)
    decisions.record_decision(who(), Action.predict, MODEL, ALLOWED, at=61.0)
    assert [type(record) for record in records] == [StrangersRefused]
    decisions.count_unauthenticated("expired", at=62.0)
    decisions.record_decision(who(), Action.predict, MODEL, DENIED, at=125.0)
    assert [type(record) for record in records] == [StrangersRefused, StrangersRefused, AccessDecided]


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(0, 1000)), max_size=200), st.integers(1, 5))
def test_unauthenticated_count_is_complete_and_memory_is_bounded(
    requests: list[tuple[str, float]], max_reasons: int
) -> None:
    """Holds for any number of reasons and any order of times."""
    records, decisions = recorder(max_reasons=max_reasons, window_s=50)
    for reason, at in requests:
        before = len(records)
        decisions.count_unauthenticated(reason, at=at)
        assert len(records) - before <= max_reasons
    decisions.flush()
    counted = [record for record in records if isinstance(record, StrangersRefused)]
    assert sum(record.count for record in counted) == len(requests)
    assert all(record.first_at <= record.last_at for record in counted)


def test_many_unauthenticated_reasons_give_few_events() -> None:
    """20,000 requests with different reasons."""
    records, decisions = recorder(max_reasons=8)
    for number in range(20_000):
        decisions.count_unauthenticated(f"reason {number}", at=number / 200)
    decisions.flush()
    assert len(records) == 16
    assert sum(record.count for record in records if isinstance(record, StrangersRefused)) == 20_000
    assert {record.reason for record in records if isinstance(record, StrangersRefused)} >= {OTHER_REASONS}


def test_sample_of_permissions_is_reproducible() -> None:
    """Two processes choose the same permissions, once per window. Another window has another sample."""
    subjects = [f"user {number}" for number in range(2000)]
    samples = []
    for _ in range(2):
        records, decisions = recorder(permit_rate=0.1)
        for subject in subjects * 2:
            decisions.record_decision(who(subject), Action.predict, MODEL, ALLOWED, at=120.0)
        samples.append(records.actors)
    expected = [
        subject for subject in subjects if is_sampled(who(subject), Action.predict, MODEL, window=2, rate=0.1)
    ]
    assert samples == [expected, expected]
    assert 150 < len(expected) < 250
    later = [s for s in subjects if is_sampled(who(s), Action.predict, MODEL, window=3, rate=0.1)]
    assert later != expected


@pytest.mark.parametrize(("rate", "recorded"), [(0.0, 0), (1.0, 50)])
def test_sample_rates_0_and_1_are_exact(rate: float, recorded: int) -> None:
    """Rate 0 records no permission, rate 1 records all."""
    records, decisions = recorder(permit_rate=rate)
    for number in range(50):
        decisions.record_decision(who(str(number)), Action.predict, MODEL, ALLOWED, at=1.0)
    assert len(records) == recorded


def test_recorded_permissions_per_window_are_bounded() -> None:
    """The limit does not apply to denials."""
    records, decisions = recorder(permit_rate=1.0, max_permits=10)
    for number in range(50):
        decisions.record_decision(who(str(number)), Action.predict, MODEL, ALLOWED, at=1.0)
        decisions.record_decision(who(str(number)), Action.predict, MODEL, DENIED, at=1.0)
    assert [record.allowed for record in records if isinstance(record, AccessDecided)].count(True) == 10
    assert len(records) == 60


def test_error_of_append_reaches_the_caller() -> None:
    """The caller must know that a denial was not recorded."""

    def broken(event: LedgerEvent, *, actor: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        DecisionRecorder(broken).record_decision(who(), Action.deploy, MODEL, DENIED, at=1.0)


def test_counts_are_thread_safe() -> None:
    """A broker answers many requests at once."""
    records, decisions = recorder()

    def many() -> None:
        for _ in range(2000):
            decisions.count_unauthenticated("expired", at=1.0)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: many(), range(4)))
    decisions.flush()
    assert records == [StrangersRefused(reason="expired", count=8000, first_at=1.0, last_at=1.0)]


@pytest.mark.parametrize(
    "wrong",
    [{"permit_rate": 1.1}, {"permit_rate": -0.1}, {"window_s": 0}, {"max_reasons": 0}, {"max_permits": -1}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    """They are refused when the recorder is created."""
    with pytest.raises(ValueError, match="must be"):
        DecisionRecorder(Records().write, **wrong)  # type: ignore[arg-type]
