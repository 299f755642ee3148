"""`python -m jobs.schedule.run_slot name=<schedule> slot=<slot>`: run a slot's command.

The scheduler submits it as a job. The process records the start, runs the command as a child with a token of the
schedule's principal, and records the end. If another process has recorded this slot's start, it does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.ledger.events import ScheduledRunFinished, ScheduledRunStarted
from cluster.session import ClusterRecord, require_recorded_cluster
from cluster.settings import PlatformConfig
from jobs.child import access_token, execute, principal_from_json, renewed_token
from jobs.ray_jobs import current_job
from jobs.schedule import schedules
from jobs.schedule.command import command_line
from jobs.schedule.scheduler import ACTOR
from jobs.schedule.schedules import Schedule


@dataclass(kw_only=True, slots=True)
class SlotConfig(PlatformConfig):
    """Configuration of `jobs.schedule.run_slot`."""

    name: str = ""
    slot: str = ""


@job("run_slot", SlotConfig)
def main(config: SlotConfig) -> None:
    """Run the slot, and exit with the exit code of its command."""
    record, ledger = require_recorded_cluster(config), open_ledger(config)
    schedule, name = schedules.require(ledger, config.name), current_job()
    command = command_line(schedule)
    started = ScheduledRunStarted(schedule=schedule.name, slot=config.slot, job=name, command=command[2:])
    if ledger.append_once(started, actor=ACTOR, schedule=schedule.name, slot=config.slot) is None:
        print(f"slot {config.slot} of schedule {schedule.name} has run already")
        return
    with callers_token(config, record, schedule) as token:
        ended = execute(
            command,
            folder=schedule.folder,
            environment=os.environ | token,
            timeout_s=schedule.spec.timeout_s,
        )
    finished = ScheduledRunFinished(
        schedule=schedule.name,
        slot=config.slot,
        job=name,
        state=ended.state,
        exit_code=ended.exit_code,
        seconds=ended.seconds,
        reason=ended.reason,
    )
    ledger.append_once(finished, actor=ACTOR, schedule=schedule.name, slot=config.slot)
    sys.exit(ended.exit_code)


@contextmanager
def callers_token(
    config: PlatformConfig, record: ClusterRecord, schedule: Schedule
) -> Iterator[dict[str, str]]:
    """Keep a token of the schedule's principal in a private file, and yield the variable that names the file.

    With an OIDC issuer, the schedule's own option `identity.token_file` names the token, and nothing is yielded.
    """
    if config.identity.issuer.url is not None:
        yield {}
        return
    places, principal = record.layout, principal_from_json(schedule.principal)
    with renewed_token(
        places, kind="schedule", new_token=lambda: access_token(places, principal)
    ) as variables:
        yield variables


if __name__ == "__main__":
    main()
