"""`python -m serve_apps.rollout action=… name=…`: start, change, show, check, promote or roll back; or a shadow."""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict
from typing import Any

from cluster.command_line import given_options, refuse_unused
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
from cluster.records.schema import SHADOW
from cluster.registry import CHAMPION, LATEST, ModelVersion, Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.session import attach, require_running_cluster
from cluster.storage import json_text, layout, resolve, write_json
from serve_apps.edge.control.waiting import wait_until_applied
from serve_apps.rollout.assignment import mixes_arms
from serve_apps.rollout.config import OWN_OPTIONS, USED, RolloutAction, RolloutConfig
from serve_apps.rollout.serving_state import ModelState, Rollout, Shadow, read_states


@job("rollout", RolloutConfig)
def main(config: RolloutConfig) -> dict[str, Any]:
    """Run one action, and print its result as JSON."""
    refuse_unused(OWN_OPTIONS - USED[config.action], by=f"action={config.action.value}")
    if config.action is RolloutAction.weight and "weight" not in given_options():
        raise RolloutError("Give the new weight in percent of units: `weight=…`.")
    record, ledger = require_running_cluster(config), open_ledger(config)
    actor = create_actor(config, record, ledger, entrypoint="serve_apps.rollout")
    states = read_states(ledger)
    if config.name not in states:
        raise ModelNotFound(f"Model '{config.name}' is not deployed.{did_you_mean(config.name, states)}")
    state = states[config.name]
    match config.action:
        case RolloutAction.start:
            result = start(config, ledger, actor, state)
        case RolloutAction.weight:
            result = change_weight(config, ledger, actor, running_rollout(config, state))
        case RolloutAction.show:
            result = asdict(state)
        case RolloutAction.promote:
            result = promote(config, ledger, actor, running_rollout(config, state))
        case RolloutAction.rollback:
            result = roll_back(config, ledger, actor, running_rollout(config, state), reason=config.reason)
        case RolloutAction.check:
            result = check(config, ledger, actor, running_rollout(config, state))
        case RolloutAction.shadow:
            result = shadow(config, ledger, actor, state)
        case RolloutAction.compare:
            result = compare(config, ledger, actor, state)
        case RolloutAction.stop_shadow:
            result = stop_shadow(config, ledger, actor, state)
    print(json_text(result))
    if config.output is not None:
        write_json(resolve(config.output), result)
    return result


def require_permission(
    config: RolloutConfig, ledger: Ledger, actor: Actor, action: Action, version: int | str
) -> ModelVersion:
    """Check that the actor may do the action on a version, and return the version.

    Raises:
        ModelNotFound: the version is not registered.
        AccessDenied: the actor may not do the action.
    """
    registered = Registry(ledger, layout(config.storage)).get(config.name, version)
    actor.check(action, registered.resource(region=config.cluster.region))
    return registered


def running_rollout(config: RolloutConfig, state: ModelState) -> Rollout:
    """Return the running rollout.

    Raises:
        RolloutError: no rollout runs.
    """
    if state.rollout is None:
        raise RolloutError(f"No rollout of '{config.name}' runs. Start one with `action=start version=…`.")
    return state.rollout


def running_shadow(config: RolloutConfig, state: ModelState) -> Shadow:
    """Return the shadow.

    Raises:
        RolloutError: the model has none.
    """
    if state.shadow is None:
        raise RolloutError(f"'{config.name}' has no shadow. Start one with `action=shadow version=…`.")
    return state.shadow


def start(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if needed, then start a rollout in which the version gets a share of the units.

    Idempotent: starting the running rollout again changes nothing.
    """
    if state.rollout is not None and str(state.rollout.treatment_version) == config.version:
        require_same(config, state.rollout)
        return asdict(state.rollout)
    if state.rollout is not None:
        raise RolloutError(
            f"Rollout {state.rollout.id} of '{config.name}' already runs, with version "
            f"{state.rollout.treatment_version}. End it first with `action=promote` or `action=rollback`."
        )
    version = require_permission(config, ledger, actor, Action.rollout, config.version)
    if state.champion_version is None or version.version == state.champion_version:
        raise RolloutError(
            f"Version {version.version} is already the champion of '{config.name}'. Start another version."
        )
    deploy_and_wait(config, ledger, actor, version, variant=config.variant)
    event = RolloutStarted(
        model=config.name,
        rollout=secrets.token_hex(4),
        salt=secrets.token_hex(8),
        treatment_version=version.version,
        treatment_variant=config.variant,
        champion_version=state.champion_version,
        weight=config.weight,
    )
    wait_until_applied(config, ledger, ledger.append(event, actor=actor.name).seq)
    return event.payload() | weight_remark(config.weight)


def deploy_and_wait(
    config: RolloutConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, variant: str
) -> str:
    """Deploy a version, wait until the edge has a backend for it, and return its application's name."""
    from serve_apps.deploy import deploy  # imported here, so that a rollback does not wait for Serve's import

    attach(config)
    app = deploy(config, ledger, actor, version, variant=variant)
    wait_until_applied(config, ledger, ledger.head(), app=app)
    return app


def require_same(config: RolloutConfig, rollout: Rollout) -> None:
    """Refuse a second start of a running rollout with other options.

    Raises:
        RolloutError: an option of the command line differs from the running rollout.
    """
    current = {"weight": rollout.weight, "variant": rollout.treatment_variant}
    for name in sorted(given_options() & current.keys()):
        if (requested := getattr(config, name)) != current[name]:
            raise RolloutError(
                f"Rollout {rollout.id} of '{config.name}' runs with {name} {current[name]}, not {requested}. "
                "Change its weight with `action=weight`, or roll it back and start another one."
            )


def change_weight(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Give the treatment another share of units.

    Raises:
        RolloutError: treated units would become control units of the same rollout.
    """
    require_permission(config, ledger, actor, Action.rollout, rollout.treatment_version)
    reached = max(rollout.reached, rollout.weight)
    if mixes_arms(reached, config.weight):
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' has treated {reached:g} % of units. At {config.weight:g} % some "
            "of them would become control units, and the comparison would be wrong. Roll it back, and start another "
            "one."
        )
    event = RolloutWeightChanged(model=config.name, rollout=rollout.id, weight=config.weight)
    wait_until_applied(config, ledger, ledger.append(event, actor=actor.name).seq)
    return event.payload() | weight_remark(config.weight)


def weight_remark(weight: float) -> dict[str, str]:
    """Return a remark if the weight limits how well the arms can be compared."""
    if weight <= 50:
        return {}
    return {
        "remark": "Above 50 % units of the control arm are treated. A comparison from now on says little, and the "
        "weight cannot go back."
    }


def promote(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Make the treatment the champion, then end the rollout. In this order, no unit goes back to the old champion.

    The result describes the rollout's outcomes, if there are any.

    Raises:
        RolloutError: the command names another version, or the outcomes breach the guardrail.
    """
    version = rollout.treatment_version
    require_permission(config, ledger, actor, Action.rollout, version)
    if config.version != LATEST:
        requested = Registry(ledger, layout(config.storage)).get(config.name, config.version).version
        if requested != version:
            raise RolloutError(
                f"Rollout {rollout.id} of '{config.name}' tries version {version}, not version {requested}. Only the "
                "version that was tried can be promoted. Leave `version` out, or start a rollout of the other one."
            )
    # Only this action and `check` read logs, so only they import Polars and delta-rs.
    from serve_apps.rollout.evaluation import judge_before_promotion

    judgement = judge_before_promotion(config, ledger, actor, rollout)
    reason = f"rollout {rollout.id} promoted {config.reason}; {judgement}"
    Registry(ledger, layout(config.storage)).move_alias(
        config.name, CHAMPION, version, actor=actor.name, reason=reason
    )
    event = RolloutPromoted(model=config.name, rollout=rollout.id, version=version)
    wait_until_applied(config, ledger, ledger.append(event, actor=actor.name).seq)
    return event.payload() | {"judged": judgement}


def roll_back(
    config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout, *, reason: str
) -> dict[str, Any]:
    """Send every unit to the champion again. The result has the time until the edge has applied this."""
    require_permission(config, ledger, actor, Action.rollback, rollout.treatment_version)
    event = RolloutRolledBack(model=config.name, rollout=rollout.id, reason=reason)
    started = time.perf_counter()
    wait_until_applied(config, ledger, ledger.append(event, actor=actor.name).seq)
    return event.payload() | {"rollback_ms": round((time.perf_counter() - started) * 1000, 1)}


def check(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Apply the guardrail to the rollout's outcomes, and roll the rollout back on a breach."""
    from serve_apps.rollout.evaluation import describe_metrics, evaluate
    from serve_apps.rollout.guardrail import Verdict

    require_permission(config, ledger, actor, Action.rollback, rollout.treatment_version)
    finding = evaluate(config, ledger, actor, rollout)
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
        result |= roll_back(config, ledger, actor, rollout, reason=describe_metrics(finding))
    return result


def shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if needed, then copy a share of the requests to it. Its answers are only logged."""
    version = require_permission(config, ledger, actor, Action.rollout, config.version)
    if state.champion_version is None or version.version == state.champion_version:
        raise RolloutError(
            f"Version {version.version} is the champion of '{config.name}', so it already answers. Shadow another one."
        )
    app = deploy_and_wait(config, ledger, actor, version, variant=SHADOW)
    event = ShadowStarted(model=config.name, version=version.version, app=app, share=config.share)
    ledger.append(event, actor=actor.name)
    return event.payload()


def compare(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Compare the shadow's answers with those that clients got for the same requests.

    The key store decides whether the caller may read the log.
    """
    from serve_apps.rollout.shadow_comparison import compare_shadow

    return asdict(compare_shadow(config, ledger, actor, running_shadow(config, state).version))


def stop_shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Stop the copies to the shadow."""
    version = running_shadow(config, state).version
    require_permission(config, ledger, actor, Action.rollback, version)
    event = ShadowStopped(model=config.name, version=version, reason=config.reason)
    ledger.append(event, actor=actor.name)
    return event.payload()


if __name__ == "__main__":
    main()
