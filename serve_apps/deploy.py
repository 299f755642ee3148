"""`python -m serve_apps.deploy name=m version=1`: have a model version served; the first one becomes champion.

`action=remove name=m version=1` ends a version that serves nobody.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ray.exceptions import RayError

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import FalajError, RefusedError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ModelDeployed, ServingRestored
from cluster.registry import CHAMPION, ModelVersion, Registry
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyNotFound
from cluster.session import attach
from cluster.settings import PlatformConfig
from cluster.storage import layout
from cluster.supervisor.head import restored
from serve_apps.apps import DeployFailed, app_name, ensure_model
from serve_apps.as_deployed import as_deployed
from serve_apps.common import ensure_common, restore_common
from serve_apps.edge.control.state import wait_until_applied
from serve_apps.predictor.log_keys import log_keys, within
from serve_apps.removal import remove, require_number
from serve_apps.rollout.assignment import require_variant
from serve_apps.rollout.state import ModelState, States, read_states


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
    as_deployed: bool = False
    """Restores each application with the settings that it was deployed with (`replica`, `online`, and as whom its
    replicas act), instead of these."""

    def __post_init__(self) -> None:
        require_variant(self.variant)


UNUSED = {
    DeployAction.deploy: ("reason", "as_deployed"),
    DeployAction.restore: ("name", "version", "variant", "reason"),
    DeployAction.remove: ("variant", "as_deployed"),
}
"""Options that mean nothing to an action."""


@job("deploy", DeployConfig, timed=True)
def main(config: DeployConfig) -> None:
    """Deploy, restore or remove."""
    refuse_unused(UNUSED[config.action], by=f"action={config.action.value}")
    ledger = open_ledger(config)
    record = attach(config)
    actor = act(config, record, ledger, entrypoint="serve_apps.deploy")
    registry = Registry(ledger, layout(config.storage))
    match config.action:
        case DeployAction.restore:
            restore(config, ledger, registry, actor)
            restored(record)
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


def restore(config: DeployConfig, ledger: Ledger, registry: Registry, actor: Actor) -> None:
    """Start the application of every model's champion, running treatment and shadow.

    One that does not start keeps no other from it.

    Raises:
        AccessDenied: the actor may not run the cluster; nobody deploys anything new here.
        DeployFailed: naming the applications that did not start.
    """
    started, region = time.perf_counter(), config.cluster.region
    versions = serving(read_states(ledger), registry)
    whole = Resource(kind="cluster", name="serving", region=region, serves=True)
    actor.check(
        Action.restart_serving,
        whole,
        *(replace(one.resource(region=region), serves=True) for one in versions),
    )
    back: list[str] = []
    failed: list[str] = []
    for version in versions:
        app = app_name(version)
        with _noted(app, failed):
            ensure_model(
                as_deployed(config, app) if config.as_deployed else config, version, actor=actor.name
            )
            wait_until_applied(config, ledger.head(), app=app)
            back.append(app)
            print(f"restored {app}")
    with _noted("features or outcomes", failed):
        (restore_common if config.as_deployed else ensure_common)(config)
    event = ServingRestored(applications=back, failed=failed, seconds=time.perf_counter() - started)
    ledger.append(event, actor=actor.name)
    if failed:
        raise DeployFailed(f"{', '.join(failed)} did not start; the others serve. The lines above say why.")


def serving(states: States, registry: Registry) -> list[ModelVersion]:
    """The versions that answer requests, by the ledger: champions, running treatments and shadows."""
    found = []
    for name, state in states.items():
        wanted = (
            state.champion_version,
            state.rollout.treatment_version if state.rollout else None,
            state.shadow.version if state.shadow else None,
        )
        numbers = dict.fromkeys(version for version in wanted if version is not None)
        found += [registry.get(name, number) for number in numbers]
    return found


@contextlib.contextmanager
def _noted(app: str, failed: list[str]) -> Iterator[None]:
    """Put an application that does not start aside, and say why."""
    try:
        yield
    except (FalajError, RayError) as error:
        print(f"{app} did not start: {error}", file=sys.stderr)
        failed.append(app)


if __name__ == "__main__":
    main()
