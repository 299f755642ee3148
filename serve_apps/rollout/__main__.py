"""`python -m serve_apps.rollout action=… name=…`: start, change, show, promote, roll back, check, shadow."""

from __future__ import annotations

import enum
import secrets
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from cluster.entrypoint import job
from cluster.errors import ModelNotFound, RolloutError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import (
    GuardrailBreached,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    ShadowStarted,
    ShadowStopped,
)
from cluster.records import SHADOW, all_outcomes, match, read_log
from cluster.registry import CHAMPION, ModelVersion, Registry
from cluster.runtime import Truths
from cluster.runtime.loader import load_signature
from cluster.security.acting import Actor, act
from cluster.security.keys.access import key_store
from cluster.security.policy import Action
from cluster.session import attach, require_record
from cluster.settings import PlatformConfig
from cluster.storage import json_text, layout, local, resolve, write_json
from serve_apps.edge.state import wait_until_applied
from serve_apps.rollout.guardrail import Finding, Verdict, judge
from serve_apps.rollout.state import ModelState, Rollout, read_states


class RolloutAction(enum.Enum):
    """What to do."""

    start = "start"
    weight = "weight"
    show = "show"
    promote = "promote"
    rollback = "rollback"
    check = "check"
    shadow = "shadow"
    stop_shadow = "stop_shadow"


@dataclass(kw_only=True, slots=True)
class RolloutConfig(PlatformConfig):
    """The command; see `configs/rollout.yaml`."""

    action: RolloutAction = RolloutAction.show
    name: str = "???"
    """Of the model."""
    version: str = "latest"
    weight: float = 10.0
    share: float = 10.0
    """Percent of requests that a shadow sees."""
    variant: str = "challenger"
    reason: str = "by command"
    min_outcomes: int = 200
    max_drop: float = 0.05
    output: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 100:
            raise ValueError(f"weight must be above 0 and at most 100 percent, got {self.weight}.")
        if not 0 < self.share <= 100:
            raise ValueError(f"share must be above 0 and at most 100 percent, got {self.share}.")
        if self.min_outcomes < 1:
            raise ValueError(f"min_outcomes must be at least 1, got {self.min_outcomes}.")


@job("rollout", RolloutConfig)
def main(config: RolloutConfig) -> None:
    """Run one command."""
    record, ledger = require_record(config), open_ledger(config)
    actor = act(config, record, ledger, entrypoint="serve_apps.rollout")
    states = read_states(ledger)
    if config.name not in states:
        raise ModelNotFound(f"Model '{config.name}' is not deployed.{did_you_mean(config.name, states)}")
    state = states[config.name]
    match config.action:
        case RolloutAction.start:
            result = start(config, ledger, actor, state)
        case RolloutAction.weight:
            result = change_weight(config, ledger, actor, running(config, state))
        case RolloutAction.show:
            result = asdict(state)
        case RolloutAction.promote:
            result = promote(config, ledger, actor, running(config, state))
        case RolloutAction.rollback:
            result = roll_back(config, ledger, actor, running(config, state), reason=config.reason)
        case RolloutAction.check:
            result = check(config, ledger, actor, running(config, state))
        case RolloutAction.shadow:
            result = shadow(config, ledger, actor, state)
        case RolloutAction.stop_shadow:
            result = stop_shadow(config, ledger, actor, state)
    print(json_text(result))
    if config.output is not None:
        write_json(resolve(config.output), result)


def permitted(
    config: RolloutConfig, ledger: Ledger, actor: Actor, action: Action, version: int | str
) -> ModelVersion:
    """The version, where the actor may do the action to it.

    Raises:
        ModelNotFound, AccessDenied
    """
    found = Registry(ledger, layout(config.storage)).get(config.name, version)
    actor.check(action, found.resource(region=config.cluster.region))
    return found


def running(config: RolloutConfig, state: ModelState) -> Rollout:
    """The rollout that runs.

    Raises:
        RolloutError: none does.
    """
    if state.rollout is None:
        raise RolloutError(f"No rollout of '{config.name}' runs. Start one with `action=start version=…`.")
    return state.rollout


def start(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if need be, then send it its share of units; started twice, it goes on as it is."""
    if state.rollout is not None and str(state.rollout.treatment_version) == config.version:
        return asdict(state.rollout)
    if state.rollout is not None:
        raise RolloutError(
            f"Rollout {state.rollout.id} of '{config.name}' runs already: promote it or roll it back first."
        )
    version = permitted(config, ledger, actor, Action.rollout, config.version)
    if state.champion_version is None or version.version == state.champion_version:
        raise RolloutError(
            f"Version {version.version} is the champion of '{config.name}': there is nothing to try."
        )
    from serve_apps.deploy import deploy  # a rollback should not wait for Serve's import

    attach(config)
    app = deploy(config, ledger, actor, version, variant=config.variant)
    wait_until_applied(config, ledger.head(), app=app)
    event = RolloutStarted(
        model=config.name,
        rollout=secrets.token_hex(4),
        salt=secrets.token_hex(8),
        treatment_version=version.version,
        treatment_variant=config.variant,
        champion_version=state.champion_version,
        weight=config.weight,
    )
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload()


def change_weight(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Give the treatment another share of units."""
    permitted(config, ledger, actor, Action.rollout, rollout.treatment_version)
    event = RolloutWeightChanged(model=config.name, rollout=rollout.id, weight=config.weight)
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload()


def promote(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Make the treatment champion, then end the rollout; in this order no unit goes back in between."""
    version = permitted(config, ledger, actor, Action.rollout, rollout.treatment_version).version
    Registry(ledger, layout(config.storage)).move_alias(
        config.name, CHAMPION, version, actor=actor.name, reason=f"rollout {rollout.id} promoted"
    )
    event = RolloutPromoted(model=config.name, rollout=rollout.id, version=version)
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload()


def roll_back(
    config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout, *, reason: str
) -> dict[str, Any]:
    """Send every unit to the champion again; gives the time from the event to the edge."""
    permitted(config, ledger, actor, Action.rollback, rollout.treatment_version)
    event = RolloutRolledBack(model=config.name, rollout=rollout.id, reason=reason)
    started = time.perf_counter()
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | {"rollback_ms": round((time.perf_counter() - started) * 1000, 1)}


def check(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Judge the rollout by its outcomes, and roll it back when the rule is breached."""
    permitted(config, ledger, actor, Action.rollback, rollout.treatment_version)
    finding = find(config, ledger, actor, rollout)
    result: dict[str, Any] = asdict(finding)
    if finding.verdict is Verdict.breached:
        event = GuardrailBreached(
            model=config.name,
            rollout=rollout.id,
            metric=finding.metric,
            treatment=finding.treatment or 0.0,
            control=finding.control or 0.0,
            threshold=config.max_drop,
            treatment_outcomes=finding.treatment_outcomes,
            control_outcomes=finding.control_outcomes,
        )
        ledger.append(event, actor=actor.name)
        reason = f"{finding.metric} {finding.treatment:.3f} against {finding.control:.3f} in control"
        result |= roll_back(config, ledger, actor, rollout, reason=reason)
    return result


def shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if need be, then have it see copies of a share of the requests, whose answers nobody sees."""
    version = permitted(config, ledger, actor, Action.rollout, config.version)
    if state.champion_version is None or version.version == state.champion_version:
        raise RolloutError(
            f"Version {version.version} is the champion of '{config.name}': its answers are seen already."
        )
    from serve_apps.deploy import deploy  # a rollback should not wait for Serve's import

    attach(config)
    app = deploy(config, ledger, actor, version, variant=SHADOW)
    wait_until_applied(config, ledger.head(), app=app)
    event = ShadowStarted(model=config.name, version=version.version, app=app, share=config.share)
    ledger.append(event, actor=actor.name)
    return event.payload()


def stop_shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Send the shadow no more copies."""
    if state.shadow is None:
        raise RolloutError(f"'{config.name}' has no shadow. Start one with `action=shadow version=…`.")
    permitted(config, ledger, actor, Action.rollback, state.shadow.version)
    event = ShadowStopped(model=config.name, version=state.shadow.version, reason=config.reason)
    ledger.append(event, actor=actor.name)
    return event.payload()


def find(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> Finding:
    """The finding over the rollout's own predictions and their outcomes."""
    places = layout(config.storage)
    registry, store = Registry(ledger, places), key_store(actor.access)
    log = read_log(local(places.predictions(config.name)), store)
    outcomes = list(all_outcomes(local(places.outcomes(config.name)), store))
    if log.answers.is_empty() or not outcomes:
        raise RolloutError(
            f"'{config.name}' has no predictions with outcomes yet; there is nothing to judge."
        )
    of_rollout = log.answers.filter(pl.col("rollout") == rollout.id)
    numbers = {rollout.treatment_version, *of_rollout["version"].to_list()}
    signatures = {number: load_signature(registry.get(config.name, number), store) for number in numbers}
    matched = match(log.answers, outcomes, {number: Truths(one) for number, one in signatures.items()})
    finding = judge(
        matched.answers.filter(pl.col("rollout") == rollout.id),
        signature=signatures[rollout.treatment_version],
        min_outcomes=config.min_outcomes,
        max_drop=config.max_drop,
    )
    failed = (
        []
        if log.failures.is_empty()
        else log.failures.filter(pl.col("rollout") == rollout.id)["arm"].to_list()
    )
    return replace(
        finding,
        unknown_outcomes=matched.unknown_predictions + matched.unknown_rows,
        treatment_failures=failed.count("treatment"),
        control_failures=failed.count("control"),
    )


if __name__ == "__main__":
    main()
