"""A version that serves nobody loses its application; its files, its log and its events stay."""

from __future__ import annotations

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import DeploymentRemoved, ModelDeployed
from cluster.registry import LATEST, ModelVersion
from cluster.security.acting import Actor
from cluster.security.authorization.policy import Action
from cluster.settings import PlatformConfig
from serve_apps.apps import app_name, remove_app
from serve_apps.edge.control.state import wait_until_applied
from serve_apps.rollout.state import ModelState, read_states


def require_number(version: str) -> None:
    """What is removed is named by its number: what `latest` or an alias means can change in the meantime.

    Raises:
        RefusedError
    """
    if not version.isdecimal():
        said = "" if version == LATEST else f", not as '{version}'"
        raise RefusedError(f"Say which version to remove by its number, `version=2`{said}.")


def remove(
    config: PlatformConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, reason: str
) -> str:
    """End a version's application, and say so in the ledger first; gives the application's name.

    Idempotent: a second run ends what an interrupted one has left.

    Raises:
        AccessDenied: the actor may not deploy it.
        RefusedError: it is not deployed, or it is the champion, a running treatment or a shadow.
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
    _take_back_if_used(ledger, actor, version)
    wait_until_applied(config, seq)
    remove_app(app)
    return app


def _require_unused(version: ModelVersion, state: ModelState) -> None:
    if (part := state.part_of(version.version)) is not None:
        raise RefusedError(
            f"Version {version.version} is {part} of '{version.name}', so it cannot be removed. Promote another "
            "version, roll back, or stop the shadow first."
        )


def _take_back_if_used(ledger: Ledger, actor: Actor, version: ModelVersion) -> None:
    """Say again that the version is deployed, where another command has begun to use it meanwhile."""
    state = read_states(ledger).get(version.name, ModelState())
    try:
        _require_unused(version, state)
    except RefusedError:
        deployed = [entry.event() for entry in ledger.entries(ModelDeployed)]
        mine = (version.name, version.version)
        ledger.append(
            [one for one in deployed if isinstance(one, ModelDeployed) and (one.name, one.version) == mine][
                -1
            ],
            actor=actor.name,
        )
        raise
