"""`python -m serve_apps.deploy name=m version=1`: have a model version served; the first one becomes champion.

`action=remove name=m version=1` ends a version that serves nobody.
"""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import RefusedError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ModelDeployed
from cluster.registry import CHAMPION, ModelVersion, Registry
from cluster.security.acting import Actor, act
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyNotFound
from cluster.security.policy import Action, Resource
from cluster.session import attach
from cluster.settings import PlatformConfig
from cluster.storage import layout
from serve_apps.apps import ensure_model
from serve_apps.common import ensure_common
from serve_apps.edge.state import wait_until_applied
from serve_apps.predictor.log_keys import log_keys, within
from serve_apps.removal import remove, require_number
from serve_apps.rollout.assignment import require_variant
from serve_apps.rollout.state import ModelState, read_states


class DeployAction(enum.Enum):
    """What to do."""

    deploy = "deploy"
    restore = "restore"
    """Bring back all applications that the ledger says serve, after the cluster was down."""
    remove = "remove"
    """End the application of a version that is no champion, no running treatment and no shadow."""


@dataclass(kw_only=True, slots=True)
class DeployConfig(PlatformConfig):
    """Which version to serve."""

    action: DeployAction = DeployAction.deploy
    name: str | None = None
    version: str = "latest"
    """A number, an alias, or `latest`."""
    variant: str = CHAMPION
    """What the version is called in answers and logs."""
    reason: str = "by command"
    """Why a version is removed."""

    def __post_init__(self) -> None:
        require_variant(self.variant)


UNUSED = {
    DeployAction.deploy: ("reason",),
    DeployAction.restore: ("name", "version", "variant", "reason"),
    DeployAction.remove: ("variant",),
}
"""Options that mean nothing to an action."""


@job("deploy", DeployConfig, timed=True)
def main(config: DeployConfig) -> None:
    """Deploy, restore or remove."""
    refuse_unused(UNUSED[config.action], by=f"action={config.action.value}")
    ledger = open_ledger(config)
    actor = act(config, attach(config), ledger, entrypoint="serve_apps.deploy")
    registry = Registry(ledger, layout(config.storage))
    match config.action:
        case DeployAction.restore:
            restore(config, ledger, registry, actor)
        case DeployAction.remove:
            require_number(config.version)
            version = registry.get(named(config), config.version)
            app = remove(config, ledger, actor, version, reason=config.reason)
            print(f"removed {version.name} version {version.version}, application {app}")
        case DeployAction.deploy:
            version = registry.get(named(config), config.version)
            app = deploy(config, ledger, actor, version, variant=config.variant)
            if CHAMPION not in registry.aliases(version.name):
                reason = "first deployment"
                registry.move_alias(version.name, CHAMPION, version.version, actor=actor.name, reason=reason)
            wait_until_applied(config, ledger.head(), app=app)
            state = read_states(ledger).get(version.name, ModelState())
            print(described(version, state, app=app, champion=registry.aliases(version.name)[CHAMPION]))


def described(version: ModelVersion, state: ModelState, *, app: str, champion: int) -> str:
    """Who answers now: a version that is not the champion gets no traffic before a rollout."""
    serving = f"serving {version.name} version {version.version} as application {app}"
    if version.version == champion:
        return serving
    if state.rollout is not None and state.rollout.treatment_version == version.version:
        return f"{serving}, with the share of requests that the running rollout gives it"
    if state.shadow is not None and state.shadow.version == version.version:
        return f"{serving}, as a shadow: copies of requests reach it, and its answers nobody"
    start = (
        f"python -m serve_apps.rollout action=start name={version.name} version={version.version} weight=10"
    )
    return (
        f"deployed {version.name} version {version.version} as application {app}; version {champion} stays champion "
        f"and keeps its traffic. Start a rollout with `{start}`, or copies of requests with `action=shadow`."
    )


def named(config: DeployConfig) -> str:
    """The model.

    Raises:
        RefusedError: none is named.
    """
    if config.name is None:
        raise RefusedError("Say which model: `name=…`.")
    return config.name


def deploy(
    config: PlatformConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, variant: str
) -> str:
    """Have a version's application running, and say so in the ledger once; gives its name.

    Raises:
        AccessDenied: the actor may not deploy it.
    """
    actor.check(Action.deploy, version.resource(region=config.cluster.region))
    keys = key_store(actor.access)
    for info in log_keys(ledger, version, region=config.cluster.region):
        with contextlib.suppress(KeyNotFound):
            info = within(keys.info(info.name), info)
        keys.ensure(info)
    ensure_common(config)
    app = ensure_model(config, version, actor=actor.name)
    known = read_states(ledger).get(version.name)
    if known is None or known.apps.get(version.version) != app:
        event = ModelDeployed(
            name=version.name, version=version.version, variant=variant, app=app, route_prefix=f"/{app}"
        )
        ledger.append(event, actor=actor.name)
    return app


def restore(config: PlatformConfig, ledger: Ledger, registry: Registry, actor: Actor) -> None:
    """Start the application of every model's champion, running treatment and shadow.

    Raises:
        AccessDenied: the actor is not one who runs the cluster; nobody deploys anything new here.
    """
    actor.check(Action.manage_cluster, Resource(kind="cluster", name="serving", region=config.cluster.region))
    ensure_common(config)
    for name, state in read_states(ledger).items():
        wanted = (
            state.champion_version,
            state.rollout.treatment_version if state.rollout else None,
            state.shadow.version if state.shadow else None,
        )
        for number in dict.fromkeys(version for version in wanted if version is not None):
            app = ensure_model(config, registry.get(name, number), actor=actor.name)
            wait_until_applied(config, ledger.head(), app=app)
            print(f"restored {app}")


if __name__ == "__main__":
    main()
