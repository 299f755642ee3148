"""Tests of the scheduler: each slot runs exactly once, whatever is killed.

`ForkedJobs` is a double of Ray's job API: it runs a slot as a forked process that records its start and its end like
`jobs.schedule.run_slot`.
"""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    ModelMonitored,
    OutcomesSummed,
    PipelineFinished,
    ScheduleApplied,
    ScheduledRunDue,
    ScheduledRunFinished,
    ScheduledRunSkipped,
    ScheduledRunStarted,
    ScheduleStateChanged,
)
from jobs.schedule import schedules
from jobs.schedule.config import Overlap, ScheduleSpec, TriggerKind, TriggerSpec
from jobs.schedule.listing import describe
from jobs.schedule.scheduler import ACTOR, Scheduler
from jobs.schedule.schedules import Schedule
from tests.processes import forks
from tests.servers.polling import wait_until

KILLS = int(os.environ.get("FALAJ_KILLS", "3"))
SPEED = 10.0
"""The scheduler's clock runs this many times faster than real time."""


class ForkedJobs:
    """Runs slots as forked processes. A folder has a file with the pid of each job."""

    def __init__(self, folder: Path, *, url: str, fails_before_start: bool = False) -> None:
        self._folder = folder
        self._url = url
        self._fails_before_start = fails_before_start

    def submit(self, job: str, schedule: Schedule, slot: str) -> None:
        """Start the slot's process. It makes the job's file first; if there is one, it does nothing."""
        path = self._folder / job
        if os.fork():
            os.wait()
            return
        os.setsid()
        if os.fork():
            os._exit(0)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(str(os.getpid()))
        try:
            os.link(draft, path)
        except FileExistsError:
            os._exit(0)
        if not self._fails_before_start:
            run_slot(Ledger(self._url), schedule.name, slot, job, done=self._folder / "runs.txt")
        os._exit(0)

    def is_over(self, job: str) -> bool | None:
        """Return whether the job's process has ended."""
        path = self._folder / job
        if not path.exists():
            return None
        return not Path(f"/proc/{path.read_text()}").exists()


def run_slot(ledger: Ledger, name: str, slot: str, job: str, *, done: Path) -> None:
    """Record the start of a slot, write a line to a file, record its end."""
    started = ScheduledRunStarted(schedule=name, slot=slot, job=job)
    if ledger.append_once(started, actor=ACTOR, schedule=name, slot=slot) is None:
        return
    with done.open("a") as file:
        file.write(f"{slot}\n")
    finished = ScheduledRunFinished(schedule=name, slot=slot, job=job, state="done", exit_code=0)
    ledger.append_once(finished, actor=ACTOR, schedule=name, slot=slot)


def schedule_all(url: str, folder: str, began: float, stop_at: float) -> None:
    """Run a scheduler whose clock is fast, until its time is over."""

    def clock() -> dt.datetime:
        return dt.datetime.fromtimestamp(began + (time.time() - began) * SPEED, dt.UTC)

    scheduler = Scheduler(Ledger(url), ForkedJobs(Path(folder), url=url), clock=clock)
    while time.time() < stop_at:
        scheduler.check_once()
        time.sleep(0.01)


def apply(ledger: Ledger, spec: ScheduleSpec, *, name: str = "s") -> None:
    """Apply a schedule."""
    applied = ScheduleApplied(
        schedule=name,
        definition=schedules.definition_of(spec),
        folder="/",
        config_dir=None,
        principal={},
    )
    ledger.append(applied, actor="t")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a new ledger."""
    return f"sqlite:///{tmp_path}/ledger.db"


def test_killed_scheduler_runs_every_slot_exactly_once(url: str, tmp_path: Path) -> None:
    """The scheduler is killed at random times. Each slot has run once in the end, in the order of time."""
    ledger = Ledger(url)
    num_slots = 10 * KILLS
    apply(ledger, ScheduleSpec(cron="* * * * * *", grace_s=1e6))
    began = time.time()
    chance = random.Random(7)
    for number in range(KILLS + 1):
        stop_at = time.time() + num_slots / SPEED / KILLS
        process = forks.context().Process(target=schedule_all, args=(url, str(tmp_path), began, stop_at + 60))
        process.start()
        if number == KILLS:
            wait_until(lambda: len(_runs(tmp_path)) >= num_slots, "all runs", seconds=60 + num_slots)
        else:
            time.sleep(chance.uniform(0.1, 2 * num_slots / SPEED / KILLS))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    due = [str(entry.payload["slot"]) for entry in ledger.entries(ScheduledRunDue)]
    runs = _runs(tmp_path)
    assert max(Counter(runs).values()) == 1
    assert due[: len(runs)] == runs
    first = dt.datetime.fromisoformat(runs[0])
    assert runs == [
        (first + dt.timedelta(seconds=number)).isoformat(timespec="seconds") for number in range(len(runs))
    ]
    assert not list(ledger.entries(ScheduledRunSkipped))


def test_killed_run_is_lost_and_named_and_not_repeated(url: str, tmp_path: Path) -> None:
    """If a slot's process is killed, the slot has run: its end says that there is no result. The next slot runs."""
    ledger = Ledger(url)
    scheduler = Scheduler(ledger, ForkedJobs(tmp_path, url=url))
    apply(ledger, ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.drift, of="m")))
    ledger.append(ScheduledRunDue(schedule="s", slot="manual-1", reason="t"), actor="t")
    ledger.append(ScheduledRunStarted(schedule="s", slot="manual-1", job="gone"), actor="t")
    ledger.append(ScheduledRunDue(schedule="s", slot="manual-2", reason="t"), actor="t")
    _check_until(scheduler, lambda: _finished(ledger) == {"manual-1": "lost", "manual-2": "done"})
    assert _runs(tmp_path) == ["manual-2"]
    assert "manual-2 done" in "\n".join(describe(ledger, now=dt.datetime.now(dt.UTC)))


def test_job_that_ends_before_its_start_is_named(url: str, tmp_path: Path) -> None:
    """A job whose process does not get to its start ends the slot with the reason."""
    ledger = Ledger(url)
    apply(ledger, ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.drift, of="m")))
    ledger.append(ScheduledRunDue(schedule="s", slot="manual-1", reason="t"), actor="t")
    scheduler = Scheduler(ledger, ForkedJobs(tmp_path, url=url, fails_before_start=True))
    _check_until(scheduler, lambda: _finished(ledger) == {"manual-1": "not started"})


def test_paused_schedule_runs_nothing_and_later_only_new_slots(url: str, tmp_path: Path) -> None:
    """Slots of the time in which a schedule was paused do not run after it is resumed."""
    ledger = Ledger(url, clock=lambda: _at("10:00:30"))
    apply(ledger, ScheduleSpec(cron="* * * * *", grace_s=1e9))
    ledger.append(ScheduleStateChanged(schedule="s", state="paused"), actor="t")
    _scheduler(url, tmp_path, "10:05:30").check_once()
    assert not list(ledger.entries(ScheduledRunDue))
    later = Ledger(url, clock=lambda: _at("10:05:30"))
    later.append(ScheduleStateChanged(schedule="s", state="active"), actor="t")
    _scheduler(url, tmp_path, "10:06:30").check_once()
    assert [str(entry.payload["slot"])[11:16] for entry in ledger.entries(ScheduledRunDue)] == ["10:06"]
    later.append(ScheduleStateChanged(schedule="s", state="removed"), actor="t")
    assert schedules.names(ledger) == []


def test_clock_that_is_set_back_runs_nothing_twice(url: str, tmp_path: Path) -> None:
    """Slots that have run do not run again when the machine's clock goes back an hour."""
    ledger = Ledger(url, clock=lambda: _at("09:59:30"))
    apply(ledger, ScheduleSpec(cron="* * * * *", grace_s=1e9))
    for now in ("10:00:30", "09:00:30", "09:30:30", "10:00:45", "10:01:10"):
        _scheduler(url, tmp_path, now).check_once()
    assert [str(entry.payload["slot"])[11:16] for entry in ledger.entries(ScheduledRunDue)] == [
        *("10:00", "10:01")
    ]


@pytest.mark.parametrize(
    ("trigger", "before", "event"),
    [
        (
            TriggerSpec(kind=TriggerKind.pipeline, of="p"),
            [
                PipelineFinished(pipeline="p", run="1", state="failed"),
                PipelineFinished(pipeline="q", run="1", state="done"),
            ],
            PipelineFinished(pipeline="p", run="2", state="done"),
        ),
        (
            TriggerSpec(kind=TriggerKind.drift, of="m"),
            [
                ModelMonitored(
                    model="m", variant="A", version=1, periods={}, drift={}, inputs={}, results=""
                ),
                ModelMonitored(
                    model="n", variant="A", version=1, periods={}, drift={"x": ["1"]}, inputs={}, results=""
                ),
            ],
            ModelMonitored(
                model="m", variant="A", version=1, periods={}, drift={"x": ["1"]}, inputs={}, results=""
            ),
        ),
        (
            TriggerSpec(kind=TriggerKind.drift, of="m"),
            [],
            ModelMonitored(
                model="m",
                variant="A",
                version=1,
                periods={},
                drift={},
                inputs={},
                results="",
                reconstruction=["1"],
            ),
        ),
        (
            TriggerSpec(kind=TriggerKind.outcomes, of="m", count=10),
            [
                OutcomesSummed(model="m", requests=1, accepted=6, digest="", first_at=0.0, last_at=0.0),
                OutcomesSummed(model="n", requests=1, accepted=9, digest="", first_at=0.0, last_at=0.0),
            ],
            OutcomesSummed(model="m", requests=1, accepted=4, digest="", first_at=0.0, last_at=0.0),
        ),
    ],
)
def test_event_triggers_one_run(
    url: str, tmp_path: Path, trigger: TriggerSpec, before: list[object], event: object
) -> None:
    """Other events trigger nothing; the right one triggers one run, and only one."""
    ledger, jobs = Ledger(url), ForkedJobs(tmp_path, url=url)
    apply(ledger, ScheduleSpec(trigger=trigger))
    for other in before:
        ledger.append(other, actor="t")  # type: ignore[arg-type]
    Scheduler(ledger, jobs).check_once()
    assert not list(ledger.entries(ScheduledRunDue))
    ledger.append(event, actor="t")  # type: ignore[arg-type]
    for _ in range(2):
        _check_until(Scheduler(ledger, jobs), lambda: len(_finished(ledger)) == 1)
    assert len(_runs(tmp_path)) == 1


def test_new_file_triggers_one_run(url: str, tmp_path: Path) -> None:
    """Each change of the files below a folder triggers one run."""
    data = tmp_path / "data"
    ledger, jobs = Ledger(url), ForkedJobs(tmp_path, url=url)
    apply(ledger, ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.data, of=str(data))))
    data.mkdir()
    for number in (1, 2):
        (data / f"{number}.parquet").write_text("x")
        for _ in range(2):
            _check_until(Scheduler(ledger, jobs), lambda count=number: len(_finished(ledger)) == count)
    assert len(_runs(tmp_path)) == 2


def test_endless_command_starts_again_when_it_has_ended(url: str, tmp_path: Path) -> None:
    """The trigger `always` starts the next run after the last one."""
    ledger = Ledger(url)
    apply(ledger, ScheduleSpec(trigger=TriggerSpec(kind=TriggerKind.always), overlap=Overlap.skip))
    for count in (1, 2):
        scheduler = Scheduler(ledger, ForkedJobs(tmp_path, url=url))
        _check_until(scheduler, lambda count=count: len(_finished(ledger)) == count)
    assert not list(ledger.entries(ScheduledRunSkipped))


def _scheduler(url: str, folder: Path, now: str) -> Scheduler:
    """Return a scheduler whose clock stands still."""
    return Scheduler(Ledger(url), ForkedJobs(folder, url=url), clock=lambda: _at(now))


def _at(time_of_day: str) -> dt.datetime:
    return dt.datetime.fromisoformat(f"2026-11-30T{time_of_day}+00:00")


def _runs(folder: Path) -> list[str]:
    path = folder / "runs.txt"
    return path.read_text().splitlines() if path.exists() else []


def _finished(ledger: Ledger) -> dict[str, str]:
    return {
        str(entry.payload["slot"]): str(entry.payload["state"])
        for entry in ledger.entries(ScheduledRunFinished)
    }


def _check_until(scheduler: Scheduler, is_reached: Callable[[], bool]) -> None:
    def check() -> bool:
        scheduler.check_once()
        return is_reached()

    wait_until(check, seconds=60)
