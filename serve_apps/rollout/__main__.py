"""`python -m serve_apps.rollout action=… name=…`: start, change, check, promote or roll back; or a shadow."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from cluster.command_line import given_options, refuse_unused
from cluster.entrypoint import job
from cluster.errors import ModelNotFound, RolloutError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import (
    GuardrailBreached,
    PolicyPaused,
    PolicyResumed,
    RolloutWeightChanged,
    ShadowStarted,
    ShadowStopped,
)
from cluster.records.schema import SHADOW
from cluster.registry import LATEST, ModelVersion, Registry
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.session import attach, require_running_cluster
from cluster.storage import json_text, layout, resolve, write_json
from serve_apps.deployed_settings import idle_cost
from serve_apps.edge.control.waiting import wait_until_applied
from serve_apps.rollout import shadow_runs, transitions
from serve_apps.rollout.assignment import mixes_arms
from serve_apps.rollout.checks import (
    require_no_champion,
    require_no_rollout,
    require_same,
    running_rollout,
    running_shadow,
    weight_remark,
)
from serve_apps.rollout.config import OWN_OPTIONS, USED, RolloutAction, RolloutConfig
from serve_apps.rollout.history import read_history
from serve_apps.rollout.policies import (
    ROLLBACK_TRIES,
    count_units,
    evidence_store,
    policy_status,
    print_plan,
    require_policy_run,
    rollback_change,
    started_events,
)
from serve_apps.rollout.serving_state import ModelState, Rollout, read_states
from serve_apps.rollout.start_checks import check_versions
from serve_apps.rollout.warm import warm_status


@job("rollout", RolloutConfig)
def main(config: RolloutConfig) -> dict[str, Any]:
    """Run one action, and print its result as JSON."""
    refuse_unused(OWN_OPTIONS - USED[config.action], by=f"action={config.action.value}")
    if config.action is RolloutAction.plan:
        return print_plan(config)
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
            result = change_weight(config, ledger, actor)
        case RolloutAction.show:
            result = show(config, ledger, state)
        case RolloutAction.promote:
            result = promote(config, ledger, actor, running_rollout(config, state))
        case RolloutAction.rollback:
            result = roll_back(config, ledger, actor, reason=config.reason)
        case RolloutAction.abort:
            result = abort(config, ledger, actor)
        case RolloutAction.pause | RolloutAction.resume:
            result = set_paused(config, ledger, actor, paused=config.action is RolloutAction.pause)
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


def show(config: RolloutConfig, ledger: Ledger, state: ModelState) -> dict[str, Any]:
    """Return the serving state of a model, its policy and decisions, and the versions that stay deployed."""
    history = read_history(ledger, config.name)
    warm = warm_status(history, state, lambda app: idle_cost(config, app))
    return asdict(state) | policy_status(history, lambda: evidence_store(ledger)) | {"warm": warm}


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


def start(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if needed, then start a rollout in which the version gets a share of the units.

    Idempotent: starting the running rollout again changes nothing.
    """
    if state.rollout is not None and str(state.rollout.treatment_version) == config.version:
        require_same(config, state.rollout, read_history(ledger, config.name))
        return asdict(state.rollout)
    require_no_rollout(config, state)
    if config.rollout is not None:
        refuse_unused({"weight"}, by="rollout=…")
    the_plan = None if config.rollout is None else config.rollout.plan()
    version = require_permission(config, ledger, actor, Action.rollout, config.version)
    require_no_champion(config, state, version.version)
    shadow_runs.require_no_other_shadow(config, state, version.version)
    assert state.champion_version is not None
    check_versions(config, ledger, actor, treatment=version.version, champion=state.champion_version)
    deploy_and_wait(
        config,
        ledger,
        actor,
        version,
        variant=SHADOW if shadow_runs.is_shadow(config) else config.variant,
    )
    since = ledger.head()
    state = read_states(ledger)[config.name]
    require_no_rollout(config, state)
    require_no_champion(config, state, version.version)
    assert state.champion_version is not None
    event, events = started_events(
        config,
        the_plan,
        version=version.version,
        champion=state.champion_version,
        principal=actor.principal,
    )
    if config.rollout is not None:
        count_units(evidence_store(ledger), event.rollout, config.rollout)
    events += shadow_runs.shadow_events(config, state, version.version)
    entries = transitions.append(ledger, config.name, events, actor=actor.name, since=since)
    wait_until_applied(config, ledger, transitions.require_appended(entries, config.name))
    return event.payload() | weight_remark(event.weight)


def deploy_and_wait(
    config: RolloutConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, variant: str
) -> str:
    """Deploy a version, wait until the edge has a backend for it, and return its application's name."""
    from serve_apps.deploy import deploy  # imported here, so that a rollback does not wait for Serve's import

    attach(config)
    app = deploy(config, ledger, actor, version, variant=variant)
    wait_until_applied(config, ledger, ledger.head(), app=app)
    return app


def change_weight(config: RolloutConfig, ledger: Ledger, actor: Actor) -> dict[str, Any]:
    """Give the treatment another share of units.

    Raises:
        RolloutError: the rollout follows a policy, or treated units would become control units of the same rollout.
    """
    since = ledger.head()
    rollout = running_rollout(config, read_states(ledger)[config.name])
    require_permission(config, ledger, actor, Action.rollout, rollout.treatment_version)
    if read_history(ledger, config.name).run is not None:
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' follows a policy, so the controller sets its weight. End it with "
            "`action=abort`, or promote it yourself with `action=promote`."
        )
    reached = max(rollout.reached, rollout.weight)
    if mixes_arms(reached, config.weight):
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' has treated {reached:g} % of units. At {config.weight:g} % some "
            "of them would become control units, and the comparison would be wrong. Roll it back, and start another "
            "one."
        )
    event = RolloutWeightChanged(model=config.name, rollout=rollout.id, weight=config.weight)
    entries = transitions.append(ledger, config.name, [event], actor=actor.name, since=since)
    wait_until_applied(config, ledger, transitions.require_appended(entries, config.name))
    return event.payload() | weight_remark(config.weight)


def promote(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Make the treatment the champion, then end the rollout. In this order, no unit goes back to the old champion.

    The result describes the rollout's outcomes, if there are any.

    Raises:
        RolloutError: the command names another version, or the outcomes breach the guardrail.
    """
    version = rollout.treatment_version
    shadow_runs.require_no_shadow_run(
        config, read_history(ledger, config.name), what="so no client has got its answers."
    )
    require_permission(config, ledger, actor, Action.rollout, version)
    if config.version != LATEST:
        requested = Registry(ledger, layout(config.storage)).get(config.name, config.version).version
        if requested != version:
            raise RolloutError(
                f"Rollout {rollout.id} of '{config.name}' tries version {version}, not version {requested}. Only the "
                "version that was tried can be promoted. Leave `version` out, or start a rollout of the other one."
            )
    # Only this action and `check` read logs, so only they import Polars and delta-rs.
    from serve_apps.rollout.comparison.evaluation import judge_before_promotion

    judgement = judge_before_promotion(config, ledger, actor, rollout)
    reason = f"rollout {rollout.id} promoted {config.reason}; {judgement}"
    since = ledger.head()  # the judgement took its time
    if running_rollout(config, read_states(ledger)[config.name]).id != rollout.id:
        raise RolloutError(f"Rollout {rollout.id} of '{config.name}' has ended meanwhile.")
    history = read_history(ledger, config.name)
    ending = transitions.Ending(model=config.name, rollout=rollout, run=history.run, reason=reason)
    events = transitions.promotion(ending, champion=history.champion)
    entries = transitions.append(ledger, config.name, events, actor=actor.name, since=since)
    wait_until_applied(config, ledger, transitions.require_appended(entries, config.name))
    return {"model": config.name, "rollout": rollout.id, "version": version, "judged": judgement}


def roll_back(config: RolloutConfig, ledger: Ledger, actor: Actor, *, reason: str) -> dict[str, Any]:
    """End the running rollout, or take back the last promotion of one. Every unit gets the earlier champion.

    The result has the time until the edge has applied this.

    Raises:
        RolloutError: no rollout runs, and none was promoted within the rollback window.
    """
    for _ in range(ROLLBACK_TRIES):
        since = ledger.head()
        change = rollback_change(
            config, read_states(ledger)[config.name], read_history(ledger, config.name), reason
        )
        require_permission(config, ledger, actor, Action.rollback, change.version)
        started = time.perf_counter()
        entries = transitions.append(ledger, config.name, change.events, actor=actor.name, since=since)
        if entries is not None:
            break
    wait_until_applied(config, ledger, transitions.require_appended(entries, config.name))
    return {
        "model": config.name,
        "rollout": change.rollout,
        "reason": reason,
        "champion": change.champion,
        "rollback_ms": round((time.perf_counter() - started) * 1000, 1),
    }


def abort(config: RolloutConfig, ledger: Ledger, actor: Actor) -> dict[str, Any]:
    """Roll back a rollout that follows a policy.

    Raises:
        RolloutError: none runs.
    """
    require_policy_run(config, read_history(ledger, config.name))
    return roll_back(config, ledger, actor, reason=f"aborted {config.reason}")


def set_paused(config: RolloutConfig, ledger: Ledger, actor: Actor, *, paused: bool) -> dict[str, Any]:
    """Pause or resume the controller for a rollout. Idempotent.

    Raises:
        RolloutError: no rollout with a policy runs.
    """
    since = ledger.head()
    run = require_policy_run(config, read_history(ledger, config.name))
    require_permission(config, ledger, actor, Action.rollback if paused else Action.rollout, run.version)
    kind = PolicyPaused if paused else PolicyResumed
    event = kind(model=config.name, rollout=run.rollout, reason=config.reason)
    if run.is_paused is not paused:
        entries = transitions.append(ledger, config.name, [event], actor=actor.name, since=since)
        transitions.require_appended(entries, config.name)
    return {"model": config.name, "rollout": run.rollout, "paused": paused}


def check(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Apply the guardrail to the rollout's outcomes, and roll the rollout back on a breach."""
    from serve_apps.rollout.comparison.evaluation import describe_metrics, evaluate
    from serve_apps.rollout.comparison.guardrail import Verdict

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
        result |= roll_back(config, ledger, actor, reason=describe_metrics(finding))
    return result


def shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if needed, then copy a share of the requests to it. Its answers are only logged."""
    version = require_permission(config, ledger, actor, Action.rollout, config.version)
    if state.champion_version is None or version.version == state.champion_version:
        raise RolloutError(
            f"Version {version.version} is the champion of '{config.name}', so it already answers. Shadow another one."
        )
    what = "so another shadow would replace it."
    shadow_runs.require_no_shadow_run(config, read_history(ledger, config.name), what=what)
    app = deploy_and_wait(config, ledger, actor, version, variant=SHADOW)
    event = ShadowStarted(model=config.name, version=version.version, app=app, share=config.share)
    ledger.append(event, actor=actor.name)
    return event.payload()


def compare(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Compare the shadow's answers with those that clients got for the same requests.

    The key store decides whether the caller may read the log.
    """
    from serve_apps.rollout.comparison.shadow import compare_shadow

    return asdict(compare_shadow(config, ledger, actor, running_shadow(config, state).version))


def stop_shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Stop the copies to the shadow."""
    version = running_shadow(config, state).version
    what = "so the controller would get no copies to judge."
    shadow_runs.require_no_shadow_run(config, read_history(ledger, config.name), what=what)
    require_permission(config, ledger, actor, Action.rollback, version)
    event = ShadowStopped(model=config.name, version=version, reason=config.reason)
    ledger.append(event, actor=actor.name)
    return event.payload()


if __name__ == "__main__":
    main()
