"""Remove the application of a version that gets no requests. The version's files, log and events stay."""

from __future__ import annotations

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import ApplicationEnded, DeploymentRemoved, ModelDeployed
from cluster.registry import LATEST, ModelVersion
from cluster.security.acting import Actor
from cluster.security.authorization.policy import Action, Resource
from cluster.settings import PlatformConfig
from serve_apps.apps import app_name, remove_app
from serve_apps.edge.control.waiting import wait_until_applied
from serve_apps.rollout.serving_state import ModelState, read_states
from serve_apps.rollout.warm import OpenRemovals


def require_number(version: str) -> None:
    """Require a version number, because `latest` or an alias may mean another version before the removal.

    Raises:
        RefusedError: `version` is `latest` or an alias.
    """
    if not version.isdecimal():
        given = "" if version == LATEST else f", not '{version}'"
        raise RefusedError(f"Give the number of the version, for example `version=2`{given}.")


def remove(
    config: PlatformConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, reason: str
) -> str:
    """Record the removal of a version's application in the ledger, remove the application, and return its name.

    Idempotent: a second run finishes what an interrupted run has not done.

    Raises:
        AccessDenied: the actor may not deploy the version.
        RefusedError: the version is not deployed, or it is the champion, a running treatment or a shadow.
    """
    actor.check(Action.deploy, version.resource(region=config.cluster.region))
    state = read_states(ledger).get(version.name, ModelState())
    app = state.apps.get(version.version)
    _require_unused(version, state)
    if app is None:
        if not remove_app(app_name(version)):
            deployed = ", ".join(map(str, sorted(state.apps))) or "none"
            raise RefusedError(
                f"Version {version.version} of '{version.name}' is not deployed. Deployed versions: {deployed}."
            )
        return app_name(version)
    event = DeploymentRemoved(name=version.name, version=version.version, app=app, reason=reason)
    seq = ledger.append(event, actor=actor.name).seq
    _undo_if_used(ledger, actor, version)
    wait_until_applied(config, ledger, seq)
    remove_app(app)
    return app


def end_removed(config: PlatformConfig, ledger: Ledger, actor: Actor) -> list[str]:
    """End the applications of versions that the controller of rollouts has removed, and return their names.

    Idempotent: a second run finishes what an interrupted run has not done.

    Raises:
        AccessDenied: the actor may not restart serving. The right to deploy is not needed, because the ledger already
            says that these versions are not deployed.
    """
    whole = Resource(kind="cluster", name="serving", region=config.cluster.region, serves=True)
    actor.check(Action.restart_serving, whole)
    ended = []
    for removed in OpenRemovals(ledger=ledger).entries(lambda: read_states(ledger)):
        app = str(removed.payload["app"])
        wait_until_applied(config, ledger, removed.seq)
        remove_app(app)
        event = ApplicationEnded(
            model=str(removed.payload["name"]),
            version=int(removed.payload["version"]),
            app=app,
            removed_seq=removed.seq,
        )
        ledger.append(event, actor=actor.name)
        ended.append(app)
    return ended


def _require_unused(version: ModelVersion, state: ModelState) -> None:
    if (usage := state.usage_of(version.version)) is not None:
        raise RefusedError(
            f"Version {version.version} is {usage} of '{version.name}', so it cannot be removed. Promote another "
            "version, roll back, or stop the shadow first."
        )


def _undo_if_used(ledger: Ledger, actor: Actor, version: ModelVersion) -> None:
    """If another command uses the version since the removal was checked, append the version's last deployment again.

    Raises:
        RefusedError: another command uses the version.
    """
    state = read_states(ledger).get(version.name, ModelState())
    try:
        _require_unused(version, state)
    except RefusedError:
        deployment = ledger.newest(ModelDeployed, name=version.name, version=version.version)
        assert deployment is not None, "A deployed version has an event."
        ledger.append(deployment.event(), actor=actor.name)
        raise
