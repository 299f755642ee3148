"""`python -m jobs.schedule action=list|apply|pause|resume|trigger|remove`: schedules of commands.

python -m jobs.schedule action=apply schedule=nightly --config-dir conf
python -m jobs.schedule action=pause name=nightly
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ScheduleApplied, ScheduledRunDue, ScheduleStateChanged
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.security.private_folder import require_unchangeable
from cluster.security.tokens.principal import principal_as_json
from cluster.session import require_running_cluster
from jobs.pipeline.stage.arguments import callers_config_dir
from jobs.schedule import schedules
from jobs.schedule.command import LOADS, check_command
from jobs.schedule.config import ScheduleAction, ScheduleConfig, TriggerKind
from jobs.schedule.cron import check_cron
from jobs.schedule.listing import describe
from jobs.schedule.triggers import check_uri

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_STATES = {
    ScheduleAction.pause: schedules.PAUSED,
    ScheduleAction.resume: schedules.ACTIVE,
    ScheduleAction.remove: schedules.REMOVED,
}


@job("schedules", ScheduleConfig)
def main(config: ScheduleConfig) -> None:
    """Do what `action` says."""
    refuse_unused(["name"] if config.action is ScheduleAction.apply else ["schedule"], by=_action(config))
    record, ledger = require_running_cluster(config), open_ledger(config)
    if config.action is ScheduleAction.list:
        refuse_unused(["name"], by=_action(config))
        print("\n".join(describe(ledger, now=dt.datetime.now(dt.UTC))))
        return
    actor = create_actor(config, record, ledger, entrypoint="jobs.schedule")
    if config.action is ScheduleAction.apply:
        apply(config, ledger, actor)
        return
    if config.name is None:
        raise ConfigError(f"Give the name of a schedule: `name=…`.{_known(ledger)}")
    name = config.name
    _check(config, actor, name, owner=_owner(ledger, name))
    if config.action is ScheduleAction.trigger:
        trigger(ledger, actor, schedules.require(ledger, name).name)
        return
    state = _STATES[config.action]
    is_removal = state == schedules.REMOVED and schedules.events_of(ledger, name) is not None
    # A schedule whose definition this release cannot read can be removed, too.
    if not is_removal and schedules.require(ledger, name).state == state:
        raise ConfigError(f"Schedule '{name}' is {state} already.")
    ledger.append(ScheduleStateChanged(schedule=name, state=state), actor=actor.name)
    print(f"schedule {name} is {state}")


def apply(config: ScheduleConfig, ledger: Ledger, actor: Actor) -> None:
    """Store a schedule, unless the ledger has it with the same definition and principal.

    Raises:
        ConfigError: No schedule is selected, or its definition is invalid.
        AccessDenied: The caller may not define schedules, or the name belongs to another caller's schedule.
    """
    name, spec = HydraConfig.get().runtime.choices.get("schedule"), config.schedule
    if name is None or spec is None:
        raise ConfigError(
            "Give the name of a schedule: `schedule=<name>` for configs/schedule/<name>.yaml, with `--config-dir "
            "FOLDER` for FOLDER/schedule/<name>.yaml."
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' is no name of a schedule. Use at most 40 small letters, digits, - and _, a letter first."
        )
    _check(config, actor, name, owner=_owner(ledger, name))
    if spec.cron is not None:
        check_cron(spec.cron, spec.time_zone)
    if spec.trigger is not None and spec.trigger.kind is TriggerKind.data:
        check_uri(spec.trigger.of)
    config_dir = callers_config_dir()
    require_unchangeable(str(Path.cwd()), config_dir, loads=LOADS)
    check_command(spec, config_dir=config_dir)
    principal = actor.principal
    applied = ScheduleApplied(
        schedule=name,
        definition=schedules.definition_of(spec),
        folder=str(Path.cwd()),
        config_dir=config_dir,
        principal=principal_as_json(principal),
    )
    events = schedules.events_of(ledger, name)
    if events is not None and events[0].payload == applied.payload():
        state = schedules.require(ledger, name).state
        print(f"schedule {name} is {state} already, with this definition")
        return
    ledger.append(applied, actor=actor.name)
    print(f"schedule {name} applied; it runs as {principal.subject} with the role {principal.role.value}")


def trigger(ledger: Ledger, actor: Actor, name: str) -> None:
    """Let a schedule's command run once, as soon as no other run of it goes on."""
    slot = f"manual-{uuid.uuid4().hex[:12]}"
    ledger.append(
        ScheduledRunDue(schedule=name, slot=slot, reason=f"triggered by {actor.name}"), actor=actor.name
    )
    print(f"slot {slot} of schedule {name} is due")


def _owner(ledger: Ledger, name: str) -> str:
    """Return the subject that applied a schedule; "" if there is no such schedule."""
    events = schedules.events_of(ledger, name)
    return "" if events is None else str(events[0].payload["principal"]["subject"])


def _check(config: ScheduleConfig, actor: Actor, name: str, *, owner: str) -> None:
    actor.check(Action.schedule_runs, schedules.resource(name, owner=owner, region=config.cluster.region))


def _action(config: ScheduleConfig) -> str:
    return f"action={config.action.value}"


def _known(ledger: Ledger) -> str:
    known = schedules.names(ledger)
    return f" Known: {', '.join(known)}." if known else " No schedule is applied."


if __name__ == "__main__":
    main()
