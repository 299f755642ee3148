"""What callers do with rollouts over HTTP: look, start, pause, resume, roll back. Each has the rights of its token.

A start needs a version that is deployed already. `python -m serve_apps.rollout action=start` also deploys.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf

from cluster.errors import InvalidRequest, ModelNotFound, RolloutError
from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, PolicyPaused, PolicyResumed
from cluster.registry import Registry
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.bearer import authenticate
from cluster.security.authorization.policy import Action, Policy
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.trust import Trust
from cluster.settings_conversion import load
from serve_apps.rollout import shadow_runs, transitions
from serve_apps.rollout.assignment import require_percent
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.evidence.store import EvidenceStore
from serve_apps.rollout.history import read_history
from serve_apps.rollout.policies import (
    ROLLBACK_TRIES,
    count_units,
    policy_status,
    require_policy_run,
    rollback_change,
    started_events,
)
from serve_apps.rollout.policy.spec import RolloutSpec
from serve_apps.rollout.serving_state import ModelState, read_states
from serve_apps.rollout.warm import warm_status

_FIELDS = {
    "start": {"version", "weight", "policy"},
    "pause": {"reason"},
    "resume": {"reason"},
    "abort": {"reason"},
    "rollback": {"reason"},
}
"""Fields of a body beside `action`, by action."""
MAX_REASON = 500


@dataclass(frozen=True, kw_only=True)
class RolloutOperations:
    """Operations of callers on the rollouts of one cluster."""

    ledger: Ledger
    store: EvidenceStore
    registry: Registry
    trust: Trust
    policy: Policy
    region: str
    environment: str
    decisions: DecisionRecorder
    cost: Callable[[str], Mapping[str, Any]]
    """Returns what an application without requests holds."""
    clock: Callable[[], float] = time.time

    def authenticate(self, authorization: str | None) -> Principal:
        """Return the principal of an Authorization header.

        Raises:
            Unauthenticated: the token is missing or not valid.
        """
        return authenticate(self.trust, self.decisions, authorization, at=self.clock())

    def show(self, principal: Principal, model: str) -> dict[str, Any]:
        """Return the serving state of a model without the salt of its rollout, its policy and decisions.

        Raises:
            ModelNotFound: the model is not deployed.
            AccessDenied: the caller may not read metadata.
        """
        state = self._state(model)
        self._require(principal, Action.read_metadata, model, state.champion_version)
        shown = asdict(state)
        if shown["rollout"] is not None:
            del shown["rollout"]["salt"]  # who knows it can choose unit ids of one arm
        if shown["watch"] is not None:
            del shown["watch"]["salt"]
        history = read_history(self.ledger, model)
        warm = warm_status(history, state, self.cost)
        return shown | policy_status(history, lambda: self.store) | {"warm": warm}

    def act(self, principal: Principal, model: str, body: object) -> dict[str, Any]:
        """Change the rollout of a model, and return what was done.

        Raises:
            InvalidRequest, ConfigError: the body is wrong.
            ModelNotFound: the model is not deployed.
            AccessDenied: the caller may not do this.
            RolloutError: the state of the rollout does not allow it.
        """
        state = self._state(model)
        action, fields = _parse(body)
        match action:
            case "start":
                return self._start(principal, model, state, fields)
            case "pause" | "resume":
                return self._set_paused(principal, model, _reason(fields), paused=action == "pause")
            case _:
                return self._roll_back(principal, model, _reason(fields), aborts=action == "abort")

    def _start(
        self, principal: Principal, model: str, state: ModelState, fields: dict[str, Any]
    ) -> dict[str, Any]:
        version = _version(fields)
        self._require(principal, Action.rollout, model, version)
        config = _start_config(model, fields)
        since = self.ledger.head()
        state = self._state(model)
        if state.rollout is not None:
            raise RolloutError(f"Rollout {state.rollout.id} of '{model}' already runs.")
        if state.champion_version is None or version == state.champion_version:
            raise RolloutError(f"Version {version} is already the champion of '{model}'.")
        if version not in state.apps:
            raise RolloutError(f"Version {version} of '{model}' is not deployed. Deploy it first.")
        shadow_runs.require_no_other_shadow(config, state, version)
        the_plan = None if config.rollout is None else config.rollout.plan()
        started, events = started_events(
            config, the_plan, version=version, champion=state.champion_version, principal=principal
        )
        if config.rollout is not None:
            count_units(self.store, started.rollout, config.rollout)
        events += shadow_runs.shadow_events(config, state, version)
        return self._append(principal, model, events, rollout=started.rollout, since=since)

    def _set_paused(self, principal: Principal, model: str, reason: str, *, paused: bool) -> dict[str, Any]:
        since = self.ledger.head()
        run = require_policy_run(RolloutConfig(name=model), read_history(self.ledger, model))
        self._require(principal, Action.rollback if paused else Action.rollout, model, run.version)
        kind = PolicyPaused if paused else PolicyResumed
        events: list[LedgerEvent] = [kind(model=model, rollout=run.rollout, reason=reason)]
        if run.is_paused is paused:
            return {"model": model, "rollout": run.rollout, "seq": since}
        return self._append(principal, model, events, rollout=run.rollout, since=since)

    def _roll_back(self, principal: Principal, model: str, reason: str, *, aborts: bool) -> dict[str, Any]:
        config, reason = RolloutConfig(name=model), f"aborted {reason}" if aborts else reason
        for _ in range(ROLLBACK_TRIES):
            since, history = self.ledger.head(), read_history(self.ledger, model)
            if aborts:
                require_policy_run(config, history)
            change = rollback_change(config, self._state(model), history, reason)
            self._require(principal, Action.rollback, model, change.version)
            entries = transitions.append(
                self.ledger, model, change.events, actor=principal.subject, since=since
            )
            if entries is not None:
                break
        return {
            "model": model,
            "rollout": change.rollout,
            "seq": transitions.require_appended(entries, model),
        }

    def _append(
        self, principal: Principal, model: str, events: list[LedgerEvent], *, rollout: str, since: int
    ) -> dict[str, Any]:
        entries = transitions.append(self.ledger, model, events, actor=principal.subject, since=since)
        return {"model": model, "rollout": rollout, "seq": transitions.require_appended(entries, model)}

    def _state(self, model: str) -> ModelState:
        state = read_states(self.ledger).get(model)
        if state is None:
            raise ModelNotFound(f"Model '{model}' is not deployed.")
        return state

    def _require(self, principal: Principal, action: Action, model: str, version: int | None) -> None:
        """Require a right on a version. The decision is an event, as every denial is."""
        target = self.registry.get(model, "latest" if version is None else version)
        resource = target.resource(region=self.region)
        decision = self.policy.decide(principal, action, resource, environment=self.environment)
        self.decisions.record_decision(principal, action, resource, decision, at=self.clock())
        self.policy.check(principal, action, resource, environment=self.environment)


def _parse(body: object) -> tuple[str, dict[str, Any]]:
    """Return the action and the other fields of a body.

    Raises:
        InvalidRequest: an unknown action or field.
    """
    if not isinstance(body, dict) or not isinstance(body.get("action"), str):
        raise InvalidRequest('Send an object with an action, such as {"action": "pause"}.')
    action = body["action"]
    if action not in _FIELDS:
        raise InvalidRequest(f"No action '{action}'. Known: {', '.join(_FIELDS)}.")
    fields = {name: value for name, value in body.items() if name != "action"}
    if unknown := fields.keys() - _FIELDS[action]:
        raise InvalidRequest(f"The action '{action}' has no field '{min(unknown)}'.")
    return action, fields


def _reason(fields: dict[str, Any]) -> str:
    reason = fields.get("reason", "by request")
    if not isinstance(reason, str) or not 0 < len(reason) <= MAX_REASON:
        raise InvalidRequest(f"'reason' must be a text of 1 to {MAX_REASON} characters.")
    return reason


def _version(fields: dict[str, Any]) -> int:
    version = fields.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 0 < version < 2**31:
        raise InvalidRequest("'version' must be the number of a version.")
    return version


def _start_config(model: str, fields: dict[str, Any]) -> RolloutConfig:
    """Return what to start. A policy takes time and memory to validate, so check the caller's rights first.

    Raises:
        InvalidRequest, ConfigError: a field is wrong.
    """
    weight, policy = fields.get("weight"), fields.get("policy")
    if (weight is None) == (policy is None):
        raise InvalidRequest("Give either 'weight' or 'policy'.")
    if policy is None:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InvalidRequest("'weight' must be a number.")
        try:
            require_percent(float(weight), name="weight")
        except (ValueError, OverflowError) as error:
            raise InvalidRequest(str(error)) from error
        return RolloutConfig(name=model, weight=float(weight))
    try:
        text = json.dumps(policy, allow_nan=False)
    except ValueError as error:
        raise InvalidRequest("'policy' must have finite numbers.") from error
    if not isinstance(policy, dict) or "${" in text:  # OmegaConf would replace it by a value of this process
        raise InvalidRequest("'policy' must be an object without interpolations.")
    try:
        spec = load(OmegaConf.create(policy), RolloutSpec)
    except RecursionError as error:
        raise InvalidRequest("'policy' is nested too deeply.") from error
    return RolloutConfig(name=model, rollout=spec)
