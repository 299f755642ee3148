"""`python -m serve_apps.deploy name=m version=1`: have a model version served; the first one becomes champion."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import RefusedError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ModelDeployed
from cluster.registry import CHAMPION, ModelVersion, Registry
from cluster.security.identity import current_actor
from cluster.session import attach
from cluster.settings import PlatformConfig
from cluster.storage import layout
from serve_apps.apps import ensure_model, ensure_outcomes
from serve_apps.edge.state import wait_until_applied
from serve_apps.rollout.state import read_states


class DeployAction(enum.Enum):
    """What to do."""

    deploy = "deploy"
    restore = "restore"
    """Bring back all applications that the ledger says serve, after the cluster was down."""


@dataclass(kw_only=True, slots=True)
class DeployConfig(PlatformConfig):
    """Which version to serve."""

    action: DeployAction = DeployAction.deploy
    name: str | None = None
    version: str = "latest"
    """A number, an alias, or `latest`."""
    variant: str = CHAMPION
    """What the version is called in answers and logs."""


@job("deploy", DeployConfig)
def main(config: DeployConfig) -> None:
    """Deploy or restore."""
    attach(config)
    ledger = open_ledger(config)
    registry = Registry(ledger, layout(config.storage))
    ensure_outcomes(config)
    match config.action:
        case DeployAction.restore:
            restore(config, ledger, registry)
        case DeployAction.deploy:
            if config.name is None:
                raise RefusedError("Say which model: `name=…`.")
            version = registry.get(config.name, config.version)
            app = deploy(config, ledger, version, variant=config.variant)
            if CHAMPION not in registry.aliases(version.name):
                actor, reason = current_actor(), "first deployment"
                registry.move_alias(version.name, CHAMPION, version.version, actor=actor, reason=reason)
            wait_until_applied(config, ledger.head(), app=app)
            print(f"serving {version.name} version {version.version} as application {app}")


def deploy(config: PlatformConfig, ledger: Ledger, version: ModelVersion, *, variant: str) -> str:
    """Have a version's application running, and say so in the ledger once; gives its name."""
    app = ensure_model(config, version)
    known = read_states(ledger).get(version.name)
    if known is None or known.apps.get(version.version) != app:
        event = ModelDeployed(
            name=version.name, version=version.version, variant=variant, app=app, route_prefix=f"/{app}"
        )
        ledger.append(event, actor=current_actor())
    return app


def restore(config: PlatformConfig, ledger: Ledger, registry: Registry) -> None:
    """Start the application of every model's champion and running treatment."""
    for name, state in read_states(ledger).items():
        wanted = (state.champion_version, state.rollout.treatment_version if state.rollout else None)
        for number in (version for version in wanted if version is not None):
            app = ensure_model(config, registry.get(name, number))
            wait_until_applied(config, ledger.head(), app=app)
            print(f"restored {app}")


if __name__ == "__main__":
    main()
