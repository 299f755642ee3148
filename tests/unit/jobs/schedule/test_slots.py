"""Tests of the slots of a schedule: cron expressions, time zones, missed and overlapping slots."""

from __future__ import annotations

import datetime as dt
from itertools import islice

import pytest

from cluster.errors import ConfigError
from jobs.schedule.config import Missed, Overlap, ScheduleSpec, TriggerKind, TriggerSpec
from jobs.schedule.cron import check_cron, slots_after
from jobs.schedule.due import CROWDED, Due, Skipped, cron_slots, event_slot

NOON = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC)
MINUTE = dt.timedelta(minutes=1)


def slots(expression: str, zone: str, start: dt.datetime, count: int) -> list[str]:
    """Return the next instants as text, in UTC."""
    return [f"{slot:%m-%d %H:%M}" for slot in islice(slots_after(expression, zone, start), count)]


def test_time_zone_moves_the_slots() -> None:
    """Half past two in Dubai is half past ten in the evening in UTC."""
    assert slots("30 2 * * *", "Asia/Dubai", NOON, 2) == ["11-30 22:30", "12-01 22:30"]


def test_fixed_hour_runs_once_on_each_day_of_a_clock_change() -> None:
    """A nightly slot is neither lost nor doubled when the clocks of its zone change."""
    spring, autumn = dt.datetime(2027, 3, 27, 12, tzinfo=dt.UTC), dt.datetime(2026, 10, 24, 12, tzinfo=dt.UTC)
    assert slots("30 2 * * *", "Europe/Berlin", spring, 2) == ["03-28 01:00", "03-29 00:30"]
    assert slots("30 2 * * *", "Europe/Berlin", autumn, 2) == ["10-25 00:30", "10-26 01:30"]


def test_every_half_hour_runs_in_both_hours_of_a_clock_change() -> None:
    """An expression for every hour runs every half hour of real time."""
    before = dt.datetime(2026, 10, 24, 23, 45, tzinfo=dt.UTC)
    assert slots("*/30 * * * *", "Europe/Berlin", before, 4) == [
        *("10-25 00:00", "10-25 00:30", "10-25 01:00", "10-25 01:30")
    ]


@pytest.mark.parametrize(
    ("expression", "zone", "named"),
    [
        ("* * * *", "UTC", "'* * * *'"),
        ("61 * * * *", "UTC", "'61 * * * *'"),
        ("0 0 30 2 *", "UTC", "'0 0 30 2 *'"),
        ("0 0 * * *", "Asia/Dubay", "'Asia/Dubay'"),
        ("0 0 * * *", "../etc/passwd", "'../etc/passwd'"),
    ],
)
def test_wrong_expression_or_zone_is_refused(expression: str, zone: str, named: str) -> None:
    """The message names what is wrong. A day that never comes is refused too."""
    with pytest.raises(ConfigError, match=named.replace("*", r"\*")):
        check_cron(expression, zone)


def spec(**settings: object) -> ScheduleSpec:
    """Return a schedule of every minute."""
    return ScheduleSpec(**{"cron": "* * * * *", "grace_s": 90.0, **settings})  # type: ignore[arg-type]


def decide(schedule: ScheduleSpec, *, minutes: float, num_unfinished: int = 0) -> list[Due | Skipped]:
    """Return the decisions this many minutes after the last slot."""
    return cron_slots(schedule, since=NOON, now=NOON + minutes * MINUTE, num_unfinished=num_unfinished)


def test_every_slot_within_the_grace_time_runs() -> None:
    """A scheduler that was restarted within the grace time runs all slots in between."""
    decided = decide(spec(), minutes=1.5)
    assert decided == [
        Due(slot="2026-11-30T12:01:00+00:00", reason="cron", position="2026-11-30T12:01:00+00:00")
    ]
    assert len(decide(spec(grace_s=1e6, max_waiting=99), minutes=60)) == 60
    assert decide(spec(), minutes=0.5) == []


def test_missed_slots_run_once_or_are_skipped() -> None:
    """Slots that are too late become one run of the last one, or none; an event counts the others."""
    once = decide(spec(), minutes=10)
    assert [type(decision) for decision in once] == [Skipped, Due, Due, Due]
    assert isinstance(once[0], Skipped)
    assert (once[0].count, once[0].last[11:16]) == (7, "12:08")
    assert isinstance(once[1], Due)
    assert once[1].slot[11:16] == "12:08"
    assert "for 8 slots" in once[1].reason
    none = decide(spec(missed=Missed.skip), minutes=10)
    assert [type(decision) for decision in none] == [Skipped, Due, Due]
    assert isinstance(none[0], Skipped)
    assert (none[0].count, none[0].reason[:6]) == (8, "missed")


def test_overlapping_slot_waits_or_is_skipped() -> None:
    """While a run goes on, a slot waits for its end, or is skipped with the reason."""
    assert [type(d) for d in decide(spec(), minutes=1, num_unfinished=1)] == [Due]
    skipped = decide(spec(overlap=Overlap.skip), minutes=1, num_unfinished=1)
    assert [(d.first, d.reason) for d in skipped if isinstance(d, Skipped)] == [
        ("2026-11-30T12:01:00+00:00", "the last run goes on")
    ]
    assert [type(d) for d in decide(spec(overlap=Overlap.skip, grace_s=999), minutes=2)] == [Due, Skipped]


def test_few_slots_wait_and_the_others_are_missed() -> None:
    """While too many wait, nothing is decided, so nothing is stored. With room again, one event counts the slots whose
    grace time is over, and the last of them runs. A slot within its grace time waits."""
    crowd = spec(max_waiting=2, grace_s=150.0)
    assert [type(d) for d in decide(crowd, minutes=3)] == [Due, Due, Due]
    assert decide(crowd, minutes=1.5, num_unfinished=3) == []
    decided = cron_slots(crowd, since=NOON, now=NOON + 60 * MINUTE, num_unfinished=1, was_crowded=True)
    assert [type(d) for d in decided] == [Skipped, Due, Due]
    assert isinstance(decided[0], Skipped)
    assert (decided[0].count, decided[0].reason) == (56, CROWDED)
    assert [d.slot[11:16] for d in decided if isinstance(d, Due)] == ["12:57", "12:58"]
    skips = cron_slots(
        spec(max_waiting=2, missed=Missed.skip), since=NOON, now=NOON + 60 * MINUTE, num_unfinished=2
    )
    assert [type(d) for d in skips] == [Skipped, Due]


def test_clock_that_is_set_back_repeats_no_slot() -> None:
    """After the clock went back an hour, the slots of that hour do not run again."""
    assert decide(spec(), minutes=-60) == []
    assert len(decide(spec(), minutes=1)) == 1


def test_event_during_a_run_waits_or_is_skipped() -> None:
    """A trigger has the same rule for overlapping runs."""
    waits = ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.drift, of="m"))
    skips = ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.drift, of="m"), overlap=Overlap.skip)
    assert isinstance(event_slot(waits, position="7", reason="drift", is_running=True), Due)
    assert isinstance(event_slot(skips, position="7", reason="drift", is_running=True), Skipped)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "schedule.cron or schedule.trigger"),
        ({"cron": "* * * * *", "trigger": TriggerSpec(kind=TriggerKind.always)}, "schedule.cron or"),
        ({"cron": "* * * * *", "grace_s": -1.0}, "grace_s"),
        ({"cron": "* * * * *", "timeout_s": 0.0}, "timeout_s"),
        ({"cron": "* * * * *", "max_waiting": 0}, "max_waiting"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], named: str) -> None:
    """A schedule has either times or a trigger, and its times are positive."""
    with pytest.raises(ValueError, match=named):
        ScheduleSpec(**settings)  # type: ignore[arg-type]
