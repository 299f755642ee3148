"""Retire a version, so that it is not deployed any more. Its files, log and events stay.

A retirement and a deployment can run at the same time. Each command appends its own event, and then looks for the event
of the other. The ledger orders the two events, so at least one of the two commands refuses.
"""

from __future__ import annotations

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import ModelReinstated, ModelRetired
from cluster.registry import ModelVersion, retirement
from cluster.security.acting import Actor
from cluster.security.authorization.policy import Action
from cluster.settings import PlatformConfig
from serve_apps.rollout.serving_state import ModelState, read_states


def retire(
    config: PlatformConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, reason: str
) -> None:
    """Record in the ledger that a version must not be deployed any more. Idempotent.

    Raises:
        AccessDenied: the actor may not roll back the model. Like a rollback, a retirement releases nothing.
        RefusedError: the version is deployed.
    """
    actor.check(Action.rollback, version.resource(region=config.cluster.region))
    require_not_deployed(ledger, version)
    if retirement(ledger, version.name, version.version) is not None:
        return
    event = ModelRetired(name=version.name, version=version.version, reason=reason)
    ledger.append(event, actor=actor.name)
    try:
        require_not_deployed(ledger, version)
    except RefusedError:
        undo = ModelReinstated(name=version.name, version=version.version, reason="deployed at the same time")
        ledger.append(undo, actor=actor.name)
        raise


def reinstate(
    config: PlatformConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, reason: str
) -> None:
    """Record in the ledger that a retired version may be deployed again.

    Raises:
        AccessDenied: the actor may not deploy the version.
        RefusedError: the version is not retired.
    """
    actor.check(Action.deploy, version.resource(region=config.cluster.region))
    if retirement(ledger, version.name, version.version) is None:
        raise RefusedError(f"Version {version.version} of '{version.name}' is not retired.")
    event = ModelReinstated(name=version.name, version=version.version, reason=reason)
    ledger.append(event, actor=actor.name)


def require_not_deployed(ledger: Ledger, version: ModelVersion) -> None:
    """Require that a version is not deployed.

    Raises:
        RefusedError: it is. The message says how to end that.
    """
    state = read_states(ledger).get(version.name, ModelState())
    usage = state.usage_of(version.version)
    remove = f"`python -m serve_apps.deploy action=remove name={version.name} version={version.version}`"
    if usage is not None:
        raise RefusedError(
            f"Version {version.version} is {usage} of '{version.name}', so it cannot be retired. Promote another "
            f"version, roll back, or stop the shadow; then run {remove}."
        )
    if version.version in state.apps:
        raise RefusedError(
            f"Version {version.version} of '{version.name}' is deployed, so it cannot be retired. Run {remove} first."
        )
