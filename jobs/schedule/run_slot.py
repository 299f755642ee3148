"""`python -m jobs.schedule.run_slot name=<schedule> slot=<slot>`: run a slot's command.

The scheduler submits it as a job. The process checks the right of the schedule's principal and the folders again,
because both can have changed since the schedule was applied. Then it records the start, runs the command as a child
with a token of this principal, and records the end. If another process has recorded this slot's start, it does nothing.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import RefusedError, first_line
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ScheduledRunFinished, ScheduledRunStarted
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Action, Policy
from cluster.security.private_folder import require_unchangeable
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tokens.principal import principal_from_json
from cluster.session import ClusterRecord, require_recorded_cluster
from cluster.settings import PlatformConfig
from jobs.child_process import execute
from jobs.command_states import NOT_STARTED
from jobs.principal_tokens import access_token, renewed_token
from jobs.ray_jobs import current_job
from jobs.schedule import schedules
from jobs.schedule.command import LOADS, command_line
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
    apply_cluster_record(record, config)
    schedule, name = schedules.require(ledger, config.name), current_job()
    if schedules.has_started(ledger, schedule.name, config.slot):
        print(f"slot {config.slot} of schedule {schedule.name} has run already")
        return
    try:
        require_unchangeable(schedule.folder, schedule.config_dir, loads=LOADS)
        check_right(config, ledger, schedule)
    except RefusedError as error:
        refused = ScheduledRunFinished(
            schedule=schedule.name, slot=config.slot, job=name, state=NOT_STARTED, reason=first_line(error)
        )
        ledger.append_once(refused, actor=ACTOR, schedule=schedule.name, slot=config.slot)
        raise
    command = command_line(schedule)
    started = ScheduledRunStarted(schedule=schedule.name, slot=config.slot, job=name, command=command[2:])
    if ledger.append_once(started, actor=ACTOR, schedule=schedule.name, slot=config.slot) is None:
        print(f"slot {config.slot} of schedule {schedule.name} has run already")
        return
    with principals_token(config, record, schedule) as variables:
        ended = execute(
            command,
            folder=schedule.folder,
            variables=variables,
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


def check_right(config: PlatformConfig, ledger: Ledger, schedule: Schedule) -> None:
    """Require that the schedule's principal may still schedule runs. The policies or the environment can have changed.

    Raises:
        AccessDenied: The principal may not. The denial is also an event.
    """
    principal, environment = principal_from_json(schedule.principal), config.identity.environment
    policy, decisions = Policy.load(region=config.cluster.region), DecisionRecorder(ledger.append)
    target = schedules.resource(schedule.name, owner=principal.subject, region=config.cluster.region)
    decisions.check(policy, principal, Action.schedule_runs, target, environment=environment, at=time.time())


def principals_token(
    config: PlatformConfig, record: ClusterRecord, schedule: Schedule
) -> AbstractContextManager[dict[str, str]]:
    """Return a context with the variable that names the file of a token of the schedule's principal.

    With an OIDC issuer there is no variable: the schedule's own option `identity.token_file` names the token.
    """
    if config.identity.issuer.url is not None:
        return nullcontext({})
    places, principal = record.layout, principal_from_json(schedule.principal)
    return renewed_token(places, kind="schedule", new_token=lambda: access_token(places, principal))


if __name__ == "__main__":
    main()
