"""`python -m serve_apps.rollout action=… name=…`: start, change, show, promote, roll back, check, shadow."""

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
from serve_apps.rollout.assignment import CHAMPION_VARIANT, mixes_arms, require_percent, require_variant
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
        for name in ("weight", "share"):
            require_percent(getattr(self, name), name=name)
        require_variant(self.variant)
        if self.variant in (CHAMPION_VARIANT, SHADOW):
            raise ValueError(
                f"variant '{self.variant}' is what records call another version. Choose another name."
            )
        if self.min_outcomes < 1:
            raise ValueError(f"min_outcomes must be at least 1, got {self.min_outcomes}.")
        if not 0 <= self.max_drop < math.inf:
            raise ValueError(f"max_drop must be a number from 0, got {self.max_drop}.")


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
"""Options that mean something to an action."""


@job("rollout", RolloutConfig)
def main(config: RolloutConfig) -> None:
    """Run one command."""
    refuse_unused(_OWN_OPTIONS - USED[config.action], by=f"action={config.action.value}")
    if config.action is RolloutAction.weight and "weight" not in given_options():
        raise RolloutError("Say which weight: `weight=…`, in percent of units.")
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
        require_same(config, state.rollout)
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
    return event.payload() | remark(config.weight)


def require_same(config: RolloutConfig, rollout: Rollout) -> None:
    """A rollout that runs is not changed by starting it again.

    Raises:
        RolloutError: an option that was given differs from what runs.
    """
    runs = {"weight": rollout.weight, "variant": rollout.treatment_variant}
    for name in sorted(given_options() & runs.keys()):
        if (asked := getattr(config, name)) != runs[name]:
            raise RolloutError(
                f"Rollout {rollout.id} of '{config.name}' runs with {name} {runs[name]}, not {asked}. "
                "`action=weight` changes its weight; roll it back to start another one."
            )


def change_weight(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Give the treatment another share of units.

    Raises:
        RolloutError: units that were treated would become the control of the same rollout.
    """
    permitted(config, ledger, actor, Action.rollout, rollout.treatment_version)
    reached = max(rollout.reached, rollout.weight)
    if mixes_arms(reached, config.weight):
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' has treated {reached:g} % of units. At {config.weight:g} % some "
            "of them would become its control, and spoil the comparison. Roll it back, and start another one."
        )
    event = RolloutWeightChanged(model=config.name, rollout=rollout.id, weight=config.weight)
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | remark(config.weight)


def remark(weight: float) -> dict[str, str]:
    """What a weight does to the comparison, where it does something."""
    if weight <= 50:
        return {}
    return {
        "remark": "Above 50 % units of the control arm are treated: what is compared from now on says little, and the "
        "weight cannot go back."
    }


def promote(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> dict[str, Any]:
    """Make the treatment champion, then end the rollout; in this order no unit goes back in between.

    The result says what outcomes speak for it, if any.

    Raises:
        RolloutError: the command means another version, or the outcomes breach the guardrail.
    """
    version = rollout.treatment_version
    permitted(config, ledger, actor, Action.rollout, version)
    if config.version != LATEST:
        meant = Registry(ledger, layout(config.storage)).get(config.name, config.version).version
        if meant != version:
            raise RolloutError(
                f"Rollout {rollout.id} of '{config.name}' tries version {version}, not version {meant}: only what was "
                "tried can be promoted. Leave `version` out, or start a rollout of the other one."
            )
    judged = judgement(config, ledger, actor, rollout)
    reason = f"rollout {rollout.id} promoted {config.reason}; {judged}"
    Registry(ledger, layout(config.storage)).move_alias(
        config.name, CHAMPION, version, actor=actor.name, reason=reason
    )
    event = RolloutPromoted(model=config.name, rollout=rollout.id, version=version)
    wait_until_applied(config, ledger.append(event, actor=actor.name).seq)
    return event.payload() | {"judged": judged}


def judgement(config: RolloutConfig, ledger: Ledger, actor: Actor, rollout: Rollout) -> str:
    """What the outcomes say of a rollout that is about to be promoted.

    Raises:
        RolloutError: they breach the guardrail.
        RecordLogCorrupt, ArtifactTampered: the log or a version was altered, so there is nothing to go by.
    """
    try:
        finding = find(config, ledger, actor, rollout)
    except (RecordLogCorrupt, ArtifactTampered):  # somebody has had a hand in what would be judged
        raise
    except RefusedError as error:
        return f"without a look at outcomes: {error}"
    said = in_words(finding, min_outcomes=config.min_outcomes)
    if finding.verdict is Verdict.breached:
        raise RolloutError(
            f"Rollout {rollout.id} of '{config.name}' is worse than its control: {said}. Roll it back, or give the "
            "`max_drop` that you accept."
        )
    return said


def in_words(finding: Finding, *, min_outcomes: int) -> str:
    """A finding for people, and for the reason of a promotion."""
    counts = f"{finding.treatment_outcomes} outcomes of the treatment and {finding.control_outcomes} of the control"
    match finding.verdict:
        case Verdict.too_few:
            return f"without a verdict: {counts}, {min_outcomes} of each are needed"
        case Verdict.undefined:
            return f"without a verdict: {counts}, but {finding.metric} is undefined where all are of one class or value"
    return f"{finding.metric} {finding.treatment:.3f} against {finding.control:.3f} in control, {counts}"


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
