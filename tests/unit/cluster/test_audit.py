"""What is recorded of decisions: denials, strangers by number, permissions by a sample anybody can recompute."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger.events import AccessDecided, DenialsCounted, LedgerEvent, StrangersRefused
from cluster.security.authorization.audit import NOBODY, OTHER_REASONS, Decisions, is_sampled
from cluster.security.authorization.denials import MAX_EVENTS_PER_ACTION, MAX_EVENTS_PER_RESOURCE, MAX_TRACKED
from cluster.security.authorization.policy import Action, Decision, Resource
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role

DENIED = Decision(allowed=False, policies=("four-eyes",))
ALLOWED = Decision(allowed=True, policies=("admin-manages",))
MODEL = Resource(kind="model", name="loan", column_class="internal")


class Records(list[LedgerEvent]):
    """What was appended, and by whom."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: list[str] = []

    def write(self, event: LedgerEvent, *, actor: str) -> None:
        self.append(event)
        self.actors.append(actor)


def who(subject: str = "alice") -> Principal:
    return Principal(subject=subject, role=Role.admin, purpose="credit", expires_at=0, tenant="north")


def test_a_denial_is_recorded_whole() -> None:
    """With who, what and why."""
    records = Records()
    decisions = Decisions(records.write, permit_rate=0.0)
    for at in (10.0, 10.0, 11.0):
        decisions.decided(who(), Action.deploy, MODEL, DENIED, at=at)
    assert len(records) == 3
    assert records[0] == AccessDecided(
        allowed=False,
        role="admin",
        purpose="credit",
        tenant="north",
        entrypoint="",
        action="deploy",
        kind="model",
        resource="loan",
        column_class="internal",
        policies=["four-eyes"],
    )
    assert records.actors == ["alice"] * 3


def test_denials_of_the_same_are_counted_after_the_first() -> None:
    """Recorded once the window is over, after which the first are whole again; another resource is not hidden."""
    records = Records()
    decisions = Decisions(records.write, window_s=60)
    for at in range(50):
        decisions.decided(who(), Action.deploy, MODEL, DENIED, at=float(at))
    assert [type(record) for record in records] == [AccessDecided] * MAX_EVENTS_PER_RESOURCE
    decisions.decided(who(), Action.deploy, replace(MODEL, name="other"), DENIED, at=59.0)
    decisions.decided(who(), Action.deploy, MODEL, DENIED, at=60.0)
    assert [type(record) for record in records[MAX_EVENTS_PER_RESOURCE:]] == [
        AccessDecided,
        DenialsCounted,
        AccessDecided,
    ]
    assert records[-2] == DenialsCounted(
        tenant="north",
        action="deploy",
        count=50 - MAX_EVENTS_PER_RESOURCE,
        first_at=float(MAX_EVENTS_PER_RESOURCE),
        last_at=49.0,
    )
    assert set(records.actors) == {"alice"}


@pytest.mark.parametrize(("subjects", "each"), [(1, 500), (3, 200), (MAX_TRACKED + 10, 1)])
def test_no_denial_is_lost_and_a_flood_is_few_records(subjects: int, each: int) -> None:
    """Whoever asks, and whatever names he makes up."""
    records = Records()
    decisions = Decisions(records.write)
    for number in range(each):
        for subject in range(subjects):
            resource = replace(MODEL, name=f"m{number}")
            decisions.decided(who(str(subject)), Action.deploy, resource, DENIED, at=1.0)
    whole = sum(isinstance(record, AccessDecided) for record in records)
    assert whole == min(each, MAX_EVENTS_PER_ACTION) * subjects
    decisions.flush()
    counted = sum(record.count for record in records if isinstance(record, DenialsCounted))
    assert whole + counted == each * subjects


def test_strangers_are_counted_per_window_and_reason() -> None:
    """Recorded once the window is over."""
    records = Records()
    decisions = Decisions(records.write, window_s=60)
    for at in (0.0, 30.0, 59.0):
        decisions.unauthenticated("expired", at=at)
    decisions.unauthenticated("no token", at=31.0)
    assert records == []
    decisions.unauthenticated("expired", at=60.0)
    assert records == [
        StrangersRefused(reason="expired", count=3, first_at=0.0, last_at=59.0),
        StrangersRefused(reason="no token", count=1, first_at=31.0, last_at=31.0),
    ]
    decisions.flush()
    assert records[2:] == [StrangersRefused(reason="expired", count=1, first_at=60.0, last_at=60.0)]
    decisions.flush()
    assert len(records) == 3
    assert set(records.actors) == {NOBODY}


def test_a_window_ends_with_a_known_principal_too() -> None:
    """Its record comes after the strangers before it."""
    records = Records()
    decisions = Decisions(records.write, permit_rate=0.0)
    decisions.unauthenticated("expired", at=1.0)
    decisions.decided(who(), Action.predict, MODEL, ALLOWED, at=61.0)
    assert [type(record) for record in records] == [StrangersRefused]
    decisions.unauthenticated("expired", at=62.0)
    decisions.decided(who(), Action.predict, MODEL, DENIED, at=125.0)
    assert [type(record) for record in records] == [StrangersRefused, StrangersRefused, AccessDecided]


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(0, 1000)), max_size=200), st.integers(1, 5))
def test_no_stranger_is_lost_and_the_memory_is_bounded(strangers: list[tuple[str, float]], most: int) -> None:
    """However many reasons they bring, in whatever order of time."""
    records = Records()
    decisions = Decisions(records.write, max_reasons=most, window_s=50)
    for reason, at in strangers:
        before = len(records)
        decisions.unauthenticated(reason, at=at)
        assert len(records) - before <= most
    decisions.flush()
    counted = [record for record in records if isinstance(record, StrangersRefused)]
    assert sum(record.count for record in counted) == len(strangers)
    assert all(record.first_at <= record.last_at for record in counted)


def test_a_flood_of_strangers_is_few_records() -> None:
    """Twenty thousand with reasons of their own."""
    records = Records()
    decisions = Decisions(records.write, max_reasons=8)
    for number in range(20_000):
        decisions.unauthenticated(f"reason {number}", at=number / 200)
    decisions.flush()
    assert len(records) == 16
    assert sum(record.count for record in records if isinstance(record, StrangersRefused)) == 20_000
    assert {record.reason for record in records if isinstance(record, StrangersRefused)} >= {OTHER_REASONS}


def test_the_sample_of_permissions_can_be_recomputed() -> None:
    """Two processes choose the same; each choice is recorded once a window; another window chooses others."""
    subjects = [f"user {number}" for number in range(2000)]
    samples = []
    for _ in range(2):
        records = Records()
        decisions = Decisions(records.write, permit_rate=0.1)
        for subject in subjects * 2:
            decisions.decided(who(subject), Action.predict, MODEL, ALLOWED, at=120.0)
        samples.append(records.actors)
    expected = [
        subject for subject in subjects if is_sampled(who(subject), Action.predict, MODEL, window=2, rate=0.1)
    ]
    assert samples == [expected, expected]
    assert 150 < len(expected) < 250
    later = [s for s in subjects if is_sampled(who(s), Action.predict, MODEL, window=3, rate=0.1)]
    assert later != expected


@pytest.mark.parametrize(("rate", "recorded"), [(0.0, 0), (1.0, 50)])
def test_none_or_all_permissions_can_be_recorded(rate: float, recorded: int) -> None:
    """The ends of the scale are exact."""
    records = Records()
    decisions = Decisions(records.write, permit_rate=rate)
    for number in range(50):
        decisions.decided(who(str(number)), Action.predict, MODEL, ALLOWED, at=1.0)
    assert len(records) == recorded


def test_permissions_of_one_window_are_bounded() -> None:
    """However many principals come; denials are not."""
    records = Records()
    decisions = Decisions(records.write, permit_rate=1.0, max_permits=10)
    for number in range(50):
        decisions.decided(who(str(number)), Action.predict, MODEL, ALLOWED, at=1.0)
        decisions.decided(who(str(number)), Action.predict, MODEL, DENIED, at=1.0)
    assert [record.allowed for record in records if isinstance(record, AccessDecided)].count(True) == 10
    assert len(records) == 60


def test_what_could_not_be_recorded_is_said() -> None:
    """The caller must know that a denial is in no ledger."""

    def broken(event: LedgerEvent, *, actor: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Decisions(broken).decided(who(), Action.deploy, MODEL, DENIED, at=1.0)


def test_threads_lose_no_count() -> None:
    """Brokers answer many at once."""
    records = Records()
    decisions = Decisions(records.write)

    def many() -> None:
        for _ in range(2000):
            decisions.unauthenticated("expired", at=1.0)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decisions.flush()
    assert records == [StrangersRefused(reason="expired", count=8000, first_at=1.0, last_at=1.0)]


@pytest.mark.parametrize(
    "wrong",
    [{"permit_rate": 1.1}, {"permit_rate": -0.1}, {"window_s": 0}, {"max_reasons": 0}, {"max_permits": -1}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    """At the start."""
    with pytest.raises(ValueError, match="must be"):
        Decisions(Records().write, **wrong)  # type: ignore[arg-type]
