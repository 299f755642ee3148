"""`python -m serve_apps.rollout action=… name=…`: start, change, show, promote, roll back or check a rollout or
shadow."""

from __future__ import annotations

import enum
import math
import secrets
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from cluster.command_line import given_options, refuse_unused
from cluster.entrypoint import job
from cluster.errors import (
    ArtifactTampered,
    ModelNotFound,
    RecordLogCorrupt,
    RefusedError,
    RolloutError,
    did_you_mean,
)
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
from cluster.registry import CHAMPION, LATEST, ModelVersion, Registry
from cluster.runtime import Truths
from cluster.runtime.loader import load_signature
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store
from cluster.session import attach, require_record
from cluster.settings import PlatformConfig
from cluster.storage import json_text, layout, local, resolve, write_json
from serve_apps.edge.control.state import wait_until_applied
from serve_apps.rollout.assignment import CHAMPION_VARIANT, Arm, mixes_arms, require_percent, require_variant
from serve_apps.rollout.guardrail import Finding, Verdict, judge
from serve_apps.rollout.state import ModelState, Rollout, read_states


class RolloutAction(enum.Enum):
    """Action of the command."""

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
    """Options of the command; see `configs/rollout.yaml`."""

    action: RolloutAction = RolloutAction.show
    name: str = "???"
    """Name of the model."""
    version: str = "latest"
    """Version to try or to shadow: a number, an alias, or `latest`. `promote` refuses if another version is tried."""
    weight: float = 10.0
    """Percent of units that the treatment answers."""
    share: float = 10.0
    """Percent of requests that are copied to a shadow."""
    variant: str = "challenger"
    """Name of the treatment in answers and logs."""
    reason: str = "by command"
    """Reason that the ledger records."""
    min_outcomes: int = 200
    """Outcomes needed in each arm for a verdict."""
    max_drop: float = 0.05
    """How far the treatment's metric may be below the control's."""
    output: str | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        for name in ("weight", "share"):
            require_percent(getattr(self, name), name=name)
        require_variant(self.variant)
        if self.variant in (CHAMPION_VARIANT, SHADOW):
            raise ValueError(f"variant '{self.variant}' is a reserved name in records. Choose another name.")
        if self.min_outcomes < 1:
            raise ValueError(f"min_outcomes must be at least 1, got {self.min_outcomes}.")
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop must be a finite number of at least 0, got {self.max_drop}.")


_OWN_OPTIONS = frozenset({"version", "weight", "share", "variant", "reason", "min_outcomes", "max_drop"})
_GUARDRAIL = frozenset({"min_outcomes", "max_drop"})
USED: dict[RolloutAction, frozenset[str]] = {
    RolloutAction.start: frozenset({"version", "weight", "variant"}),
    RolloutAction.weight: frozenset({"weight"}),
    RolloutAction.show: frozenset(),
    RolloutAction.promote: frozenset({"version", "reason"}) | _GUARDRAIL,
    RolloutAction.rollback: frozenset({"reason"}),
    RolloutAction.check: _GUARDRAIL,
    RolloutAction.shadow: frozenset({"version", "share"}),
    RolloutAction.stop_shadow: frozenset({"reason"}),
}
"""Options that an action uses."""


@job("rollout", RolloutConfig)
def main(config: RolloutConfig) -> None:
    """Run one action, and print its result as JSON."""
    refuse_unused(_OWN_OPTIONS - USED[config.action], by=f"action={config.action.value}")
    if config.action is RolloutAction.weight and "weight" not in given_options():
        raise RolloutError("Give the new weight in percent of units: `weight=…`.")
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
        case RolloutAction.stop_shadow:
            result = stop_shadow(config, ledger, actor, state)
    print(json_text(result))
    if config.output is not None:
        write_json(resolve(config.output), result)


def require_permission(
    config: RolloutConfig, ledger: Ledger, actor: Actor, action: Action, version: int | str
) -> ModelVersion:
    """Return the version, after checking that the actor may do the action to it.

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


def start(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if needed, then send it its share of units.

    Idempotent: starting the running rollout again changes nothing.
    """
    if state.rollout is not None and str(state.rollout.treatment_version) == config.version:
        require_same(config, state.rollout)
        return asdict(state.rollout)
    if state.rollout is not None:
        raise RolloutError(
            f"Rollout {state.rollout.id} of '{config.name}' already runs. Promote it or roll it back first."
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
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | weight_remark(config.weight)


def deploy_and_wait(
    config: RolloutConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, variant: str
) -> str:
    """Deploy a version, wait until the edge has its backend, and return its application's name."""
    from serve_apps.deploy import deploy  # a rollback should not wait for Serve's import

    attach(config)
    app = deploy(config, ledger, actor, version, variant=variant)
    wait_until_applied(config, ledger.head(), app=app)
    return app


def require_same(config: RolloutConfig, rollout: Rollout) -> None:
    """Refuse to change a running rollout by starting it again.

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
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | weight_remark(config.weight)


def weight_remark(weight: float) -> dict[str, str]:
    """Return a remark on the comparison, if the weight affects it."""
    if weight <= 50:
        return {}
    return {
        "remark": "Above 50 % units of the control arm are treated. A comparison from now on says little, and the "
        "weight cannot go back."
    }


def promote(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Make the treatment the champion, then end the rollout; in this order no unit goes back to the old champion.

    The result describes the outcomes that support it, if any.

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
    judgement = judge_before_promotion(config, ledger, actor, rollout)
    reason = f"rollout {rollout.id} promoted {config.reason}; {judgement}"
    Registry(ledger, layout(config.storage)).move_alias(
        config.name, CHAMPION, version, actor=actor.name, reason=reason
    )
    event = RolloutPromoted(model=config.name, rollout=rollout.id, version=version)
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | {"judged": judgement}


def judge_before_promotion(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> str:
    """Describe the outcomes of a rollout, and refuse its promotion if they breach the guardrail.

    Raises:
        RolloutError: they breach the guardrail.
        RecordLogCorrupt, ArtifactTampered: the log or a version was altered, so its outcomes prove nothing.
    """
    try:
        finding = evaluate(config, ledger, actor, rollout)
    except (RecordLogCorrupt, ArtifactTampered):
        raise
    except RefusedError as error:
        return f"without outcomes: {error}"
    description = describe(finding, min_outcomes=config.min_outcomes)
    if finding.verdict is Verdict.breached:
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' is worse than its control: {description}. Roll it back, or give "
            "the `max_drop` that you accept."
        )
    return description


def describe(finding: Finding, *, min_outcomes: int) -> str:
    """Describe a finding in words, for the operator and for the reason of a promotion."""
    counts = f"{finding.treatment_outcomes} outcomes of the treatment and {finding.control_outcomes} of the control"
    match finding.verdict:
        case Verdict.too_few:
            return f"without a verdict: {counts}, {min_outcomes} of each are needed"
        case Verdict.undefined:
            return f"without a verdict: {counts}, but {finding.metric} is undefined if all are of one class or value"
    return f"{_metrics_in_words(finding)}, {counts}"


def _metrics_in_words(finding: Finding) -> str:
    return f"{finding.metric} {finding.treatment:.3f} against {finding.control:.3f} in control"


def roll_back(
    config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout, *, reason: str
) -> dict[str, Any]:
    """Send every unit to the champion again; return the time from the event to its effect at the edge."""
    require_permission(config, ledger, actor, Action.rollback, rollout.treatment_version)
    event = RolloutRolledBack(model=config.name, rollout=rollout.id, reason=reason)
    started = time.perf_counter()
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | {"rollback_ms": round((time.perf_counter() - started) * 1000, 1)}


def check(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Apply the guardrail to the rollout's outcomes, and roll the rollout back on a breach."""
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
        result |= roll_back(config, ledger, actor, rollout, reason=_metrics_in_words(finding))
    return result


def shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Deploy the version if needed, then copy a share of the requests to it; its answers go only into the log."""
    version = require_permission(config, ledger, actor, Action.rollout, config.version)
    if state.champion_version is None or version.version == state.champion_version:
        raise RolloutError(
            f"Version {version.version} is the champion of '{config.name}', so it already answers. Shadow another one."
        )
    app = deploy_and_wait(config, ledger, actor, version, variant=SHADOW)
    event = ShadowStarted(model=config.name, version=version.version, app=app, share=config.share)
    ledger.append(event, actor=actor.name)
    return event.payload()


def stop_shadow(config: RolloutConfig, ledger: Ledger, actor: Actor, state: ModelState) -> dict[str, Any]:
    """Stop the copies to the shadow."""
    if state.shadow is None:
        raise RolloutError(f"'{config.name}' has no shadow. Start one with `action=shadow version=…`.")
    require_permission(config, ledger, actor, Action.rollback, state.shadow.version)
    event = ShadowStopped(model=config.name, version=state.shadow.version, reason=config.reason)
    ledger.append(event, actor=actor.name)
    return event.payload()


def evaluate(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> Finding:
    """Apply the guardrail to the rollout's own predictions and their outcomes.

    Raises:
        RolloutError: no prediction has an outcome yet.
    """
    places = layout(config.storage)
    registry, store = Registry(ledger, places), key_store(actor.access)
    log = read_log(local(places.predictions(config.name)), store)
    outcomes = list(all_outcomes(local(places.outcomes(config.name)), store))
    if log.answers.is_empty() or not outcomes:
        raise RolloutError(
            f"'{config.name}' has no predictions with outcomes yet, so there is nothing to compare."
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
    failed_arms = (
        []
        if log.failures.is_empty()
        else log.failures.filter(pl.col("rollout") == rollout.id)["arm"].to_list()
    )
    return replace(
        finding,
        unknown_outcomes=matched.unknown_predictions + matched.unknown_rows,
        treatment_failures=failed_arms.count(Arm.treatment),
        control_failures=failed_arms.count(Arm.control),
    )


if __name__ == "__main__":
    main()
