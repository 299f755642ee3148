"""Tests of a broken schedule among others, and of a schedule of another caller."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.ledger.events import (
    PipelineFinished,
    ScheduleApplied,
    ScheduledRunDue,
    ScheduledRunFinished,
    ScheduledRunSkipped,
    ScheduleStateChanged,
)
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.private_folder import require_unchangeable
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from jobs.schedule import schedules
from jobs.schedule.config import Missed, ScheduleSpec, TriggerKind, TriggerSpec
from jobs.schedule.cron import last_slot_before, slots_after
from jobs.schedule.due import CROWDED, MAX_MISSED, Due, Skipped, cron_slots
from jobs.schedule.listing import describe
from jobs.schedule.scheduler import Scheduler
from jobs.schedule.schedules import Schedule
from jobs.schedule.triggers import check_uri

NOW = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)


class NoJobs:
    """A double of Ray's job API that starts nothing."""

    def submit(self, job: str, schedule: Schedule, slot: str) -> None:
        return None

    def is_over(self, job: str) -> bool | None:
        return None


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def apply(ledger: Ledger, name: str, spec: ScheduleSpec, **changes: object) -> None:
    definition = schedules.definition_of(spec) | changes
    applied = ScheduleApplied(
        schedule=name,
        definition=definition,
        folder="/",
        config_dir=None,
        principal={},
    )
    ledger.append(applied, actor="t")


def due(ledger: Ledger) -> set[str]:
    return {str(entry.payload["schedule"]) for entry in ledger.entries(ScheduledRunDue)}


@pytest.mark.parametrize("uri", ["weird://x", "s3://bucket/x"])
def test_trigger_that_fails_stops_no_other_schedule(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """An unknown protocol, or an object store without a login, raises an error of its library. Before, it ended the
    scheduler again and again. `last_check` shows the error."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    apply(ledger, "broken", ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.data, of=uri)))
    apply(ledger, "whole", ScheduleSpec(cron="* * * * *"))
    later = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1)
    scheduler = Scheduler(ledger, NoJobs(), clock=lambda: later)
    scheduler.check_once()
    assert due(ledger) == {"whole"}
    assert scheduler._metrics.last_check._value.get() == 0


def test_unknown_protocol_is_refused_when_the_schedule_is_applied() -> None:
    """A URI that can be read passes, also if there are no files yet."""
    check_uri("no/such/folder")
    with pytest.raises(ConfigError, match="'weird://x' cannot be read"):
        check_uri("weird://x")


def test_definition_of_another_release_stops_no_other_schedule(ledger: Ledger) -> None:
    """Its value is unknown here. The list names it, and it can be applied again or removed."""
    apply(ledger, "newer", ScheduleSpec(cron="* * * * *"), missed="run_all")
    apply(ledger, "whole", ScheduleSpec(cron="* * * * *"))
    later = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1)
    scheduler = Scheduler(ledger, NoJobs(), clock=lambda: later)
    scheduler.check_once()
    assert due(ledger) == {"whole"}
    assert any(line.startswith("newer  unreadable") for line in describe(ledger, now=NOW))
    ledger.append(ScheduleStateChanged(schedule="newer", state=schedules.REMOVED), actor="t")
    assert schedules.names(ledger) == ["whole"]


def test_expression_with_a_year_ends(ledger: Ledger) -> None:
    """After its last slot, there is none. Before, this ended the scheduler and the list."""
    expression = "30 2 1 1 * 0 2027"
    assert [slot.year for slot in slots_after(expression, "UTC", NOW)] == [2027]
    after = dt.datetime(2028, 1, 1, tzinfo=dt.UTC)
    spec = ScheduleSpec(cron=expression)
    assert cron_slots(spec, since=after, now=after + HOUR) == []
    apply(ledger, "once", spec)
    assert "    next: never" in list(describe(ledger, now=after))


def test_slots_of_a_year_are_decided_at_once() -> None:
    """There are 31 million. Only the first ones are counted, the last one runs, and so do those in time."""
    spec, began = ScheduleSpec(cron="* * * * * *", grace_s=1.5), time.monotonic()
    decided = cron_slots(spec, since=NOW - 24 * 365 * HOUR, now=NOW)
    assert time.monotonic() - began < 20
    assert [type(decision) for decision in decided] == [Skipped, Due, Due, Due]
    assert isinstance(decided[0], Skipped)
    assert decided[0].count == MAX_MISSED - 1
    slots = [decision.slot for decision in decided if isinstance(decision, Due)]
    assert slots == [f"2026-11-30T{time}+00:00" for time in ("11:59:58", "11:59:59", "12:00:00")]
    skipped = cron_slots(
        ScheduleSpec(cron="* * * * * *", missed=Missed.skip),
        since=NOW - 48 * HOUR,
        now=NOW,
    )
    assert isinstance(skipped[0], Skipped)
    assert skipped[0].position == "2026-11-30T11:58:59+00:00"


def test_fast_cron_with_a_slow_run_makes_few_events(ledger: Ledger) -> None:
    """A run goes on for an hour, and a slot is due each second. Few slots wait, and the ledger does not grow. After the
    run, one event counts the missed slots."""
    apply(ledger, "fast", ScheduleSpec(cron="* * * * * *", max_waiting=3))
    clock = [dt.datetime.now(dt.UTC)]
    scheduler = Scheduler(ledger, NoJobs(), clock=lambda: clock[0])
    for _ in range(600):
        clock[0] += dt.timedelta(seconds=6)
        scheduler.check_once()
    waiting = schedules.unfinished(ledger, "fast")
    assert (len(waiting), list(ledger.entries(ScheduledRunSkipped))) == (4, [])
    finished = ScheduledRunFinished(schedule="fast", slot=waiting[0].key, job="j", state="done")
    ledger.append(finished, actor="t")
    scheduler.check_once()
    [skipped] = ledger.entries(ScheduledRunSkipped)
    assert (skipped.payload["count"] > 3500, skipped.payload["reason"]) == (True, CROWDED)
    assert len(schedules.unfinished(ledger, "fast")) == 4


def test_trigger_without_room_starts_one_run_later(ledger: Ledger) -> None:
    """While too many slots wait, events are not detected. They are not lost."""
    spec = ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.pipeline, of="p"), max_waiting=1)
    apply(ledger, "after", spec)
    for number in range(6):
        ledger.append(PipelineFinished(pipeline="p", run=str(number), state="done"), actor="t")
        Scheduler(ledger, NoJobs()).check_once()
    first, _ = schedules.unfinished(ledger, "after")
    ledger.append(ScheduledRunFinished(schedule="after", slot=first.key, job="j", state="done"), actor="t")
    Scheduler(ledger, NoJobs()).check_once()
    assert len(list(ledger.entries(ScheduledRunDue))) == 3
    assert list(ledger.entries(ScheduledRunDue))[-1].payload["reason"] == "run 5 of pipeline p is done"


def test_last_slot_before_is_the_last_of_all_slots() -> None:
    """It needs no look at the slots before it."""
    for expression in ("*/7 * * * *", "0 0 * * 1", "* * * * * */5"):
        expected = None
        for slot in slots_after(expression, "Asia/Dubai", NOW - 24 * 8 * HOUR):
            if slot >= NOW:
                break
            expected = slot
        assert last_slot_before(expression, "Asia/Dubai", NOW) == expected


@pytest.mark.parametrize("role", [Role.data_engineer, Role.data_scientist, Role.ml_engineer, Role.admin])
def test_only_its_owner_and_an_admin_control_a_schedule(role: Role) -> None:
    """Otherwise another caller could start its runs, which have the owner's rights, or replace it. A name without a
    schedule is free. This also holds in a region, and in production."""
    policy = Policy.load(region="eu")
    for subject, owner, allowed in (
        ("alice", "", True),
        ("alice", "alice", True),
        ("bob", "alice", role is Role.admin),
    ):
        principal = Principal(
            subject=subject, role=role, purpose="", tenant="default", models=None, expires_at=0
        )
        schedule = Resource(kind="schedule", name="nightly", registered_by=owner, region="eu")
        decided = policy.decide(principal, Action.schedule_runs, schedule, environment="production")
        assert decided.allowed is allowed, (subject, owner)


def test_folder_that_others_may_change_is_refused(tmp_path: Path) -> None:
    """They could put a module or a configuration there. The sticky bit does not prevent new files."""
    own, conf = tmp_path / "project", tmp_path / "project" / "conf"
    conf.mkdir(parents=True)
    require_unchangeable(str(own), str(conf), None, loads="x")
    for mode in (0o777, 0o1777):
        conf.chmod(mode)
        with pytest.raises(ConfigError, match=r"conf.*can be changed by others"):
            require_unchangeable(str(own), str(conf), loads="x")
    conf.chmod(0o700)
    own.chmod(0o777)
    with pytest.raises(ConfigError, match="can be changed by others"):
        require_unchangeable(str(conf), loads="x")
    with pytest.raises(ConfigError, match="cannot be read"):
        require_unchangeable(str(own / "missing"), loads="x")
