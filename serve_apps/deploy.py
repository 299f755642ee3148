"""`python -m serve_apps.deploy name=m version=1`: serve a model version; the first one becomes the champion.

`action=remove name=m version=1` removes the application of a version that gets no requests. `action=retire name=m
version=1` marks a version that must not be deployed any more.
"""

from __future__ import annotations

import contextlib
import enum
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError

from cluster.command_line import refuse_unused
from cluster.entrypoint import job
from cluster.errors import FalajError, RefusedError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ModelDeployed, ServingRestored
from cluster.ledger.store import utc_now
from cluster.registry import CHAMPION, ModelVersion, Registry, require_not_retired
from cluster.runtime.loader import require_rows
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyNotFound
from cluster.session import attach
from cluster.settings import PlatformConfig
from cluster.storage import layout
from cluster.supervisor.head import mark_restored
from feature_jobs.store.catalog.log_keys import log_keys, merged_key
from serve_apps.apps import DeployFailed, app_name, ensure_model, wait_for_recovery
from serve_apps.deployed_settings import with_deployed_settings
from serve_apps.edge.control.waiting import wait_until_applied
from serve_apps.retirement import reinstate, retire
from serve_apps.rollout.assignment import require_variant
from serve_apps.rollout.history import History, read_histories
from serve_apps.rollout.serving_state import ModelState, States, read_states
from serve_apps.shared_apps import APPLICATIONS, ensure_shared_apps, restore_shared_apps
from serve_apps.undeploy import end_removed, remove, require_number


class DeployAction(enum.Enum):
    """Action of the command."""

    deploy = "deploy"
    restore = "restore"
    """After the cluster was down, start all applications that get requests according to the ledger."""
    remove = "remove"
    """Remove the application of a version that is not the champion, a running treatment or a shadow."""
    end_removed = "end_removed"
    """End the applications of versions that the controller of rollouts has removed from the ledger."""
    retire = "retire"
    """Mark a version that is not deployed, so that it is not deployed any more."""
    reinstate = "reinstate"
    """End a retirement."""


@dataclass(kw_only=True, slots=True)
class DeployConfig(PlatformConfig):
    """Options of the command."""

    action: DeployAction = DeployAction.deploy
    name: str | None = None
    """Name of the model."""
    version: str = "latest"
    """Version number, alias, or `latest`."""
    variant: str = CHAMPION
    """Name of the version in answers and logs."""
    reason: str = "by command"
    """Reason of a removal, a retirement or the end of one."""
    as_deployed: bool = False
    """Whether to restore each application with the settings that it was deployed with (`replica`, `online`, its purpose
    and its token). If False, the settings of this command are used."""

    def __post_init__(self) -> None:
        require_variant(self.variant)


UNUSED = {
    DeployAction.deploy: ("reason", "as_deployed"),
    DeployAction.restore: ("name", "version", "variant", "reason"),
    DeployAction.end_removed: ("name", "version", "variant", "reason", "as_deployed"),
    DeployAction.remove: ("variant", "as_deployed"),
    DeployAction.retire: ("variant", "as_deployed"),
    DeployAction.reinstate: ("variant", "as_deployed"),
}
"""Options that an action does not use."""


@job("deploy", DeployConfig, timed=True)
def main(config: DeployConfig) -> dict[str, Any] | None:
    """Deploy, restore or remove applications. The result of a deployment says which version gets the requests."""
    refuse_unused(UNUSED[config.action], by=f"action={config.action.value}")
    ledger = open_ledger(config)
    record = attach(config)
    actor = create_actor(config, record, ledger, entrypoint="serve_apps.deploy")
    registry = Registry(ledger, layout(config.storage))
    match config.action:
        case DeployAction.restore:
            restore(config, ledger, registry, actor)
            mark_restored(record)
        case DeployAction.end_removed:
            for app in end_removed(config, ledger, actor):
                print(f"ended application {app}")
        case DeployAction.remove:
            require_number(config.version)
            version = registry.get(require_name(config), config.version)
            app = remove(config, ledger, actor, version, reason=config.reason)
            print(f"removed {version.name} version {version.version}, application {app}")
        case DeployAction.retire | DeployAction.reinstate:
            require_number(config.version)
            version = registry.get(require_name(config), config.version)
            change = retire if config.action is DeployAction.retire else reinstate
            change(config, ledger, actor, version, reason=config.reason)
            print(f"{config.action.value}d {version.name} version {version.version}")
        case DeployAction.deploy:
            version = registry.get(require_name(config), config.version)
            app = deploy(config, ledger, actor, version, variant=config.variant)
            if CHAMPION not in registry.aliases(version.name):
                reason = "first deployment"
                registry.move_alias(version.name, CHAMPION, version.version, actor=actor.name, reason=reason)
            wait_until_applied(config, ledger, ledger.head(), app=app)
            state = read_states(ledger).get(version.name, ModelState())
            champion = registry.aliases(version.name)[CHAMPION]
            summary = describe(version, state, app=app, champion=champion)
            print(summary)
            return {
                "version": version.version,
                "champion": champion,
                "application": app,
                "summary": summary,
            }
    return None


def describe(version: ModelVersion, state: ModelState, *, app: str, champion: int) -> str:
    """Describe which requests a version gets now. Before a rollout, only the champion gets requests."""
    serving = f"serving {version.name} version {version.version} as application {app}"
    if version.version == champion:
        return serving
    if state.rollout is not None and state.rollout.treatment_version == version.version:
        return f"{serving}, with the share of requests that the running rollout gives it"
    if state.shadow is not None and state.shadow.version == version.version:
        return f"{serving}, as a shadow: it gets copies of requests, and its answers go only into the log"
    start = (
        f"python -m serve_apps.rollout action=start name={version.name} version={version.version} weight=10"
    )
    return (
        f"deployed {version.name} version {version.version} as application {app}; version {champion} stays champion "
        f"and keeps its traffic. Start a rollout with `{start}`, or a shadow with `action=shadow`."
    )


def require_name(config: DeployConfig) -> str:
    """Return the model's name.

    Raises:
        RefusedError: the command has no name.
    """
    if config.name is None:
        raise RefusedError("Give the model's name: `name=…`.")
    return config.name


def deploy(
    config: PlatformConfig, ledger: Ledger, actor: Actor, version: ModelVersion, *, variant: str
) -> str:
    """Start a version's application, record the deployment in the ledger once, and return the application's name.

    Raises:
        AccessDenied: the actor may not deploy the version.
        RefusedError: the version is retired, or a language model.
    """
    require_rows(version)
    actor.check(Action.deploy, version.resource(region=config.cluster.region))
    registry = Registry(ledger, layout(config.storage))
    require_not_retired(ledger, registry, version)
    keys = key_store(actor.access)
    for info in log_keys(ledger, version, region=config.cluster.region):
        with contextlib.suppress(KeyNotFound):
            info = merged_key(keys.info(info.name), info)
        keys.ensure(info)
    ensure_shared_apps(config)
    app = ensure_model(config, version, actor=actor.name)
    state = read_states(ledger).get(version.name)
    if state is None or state.apps.get(version.version) != app:
        event = ModelDeployed(
            name=version.name, version=version.version, variant=variant, app=app, route_prefix=f"/{app}"
        )
        ledger.append(event, actor=actor.name)
        require_not_retired(ledger, registry, version)
    return app


def restore(config: DeployConfig, ledger: Ledger, registry: Registry, actor: Actor) -> None:
    """Start the application of every model's champion, running treatment, shadow, and predecessor of a promotion.

    If one application does not start, the others are still started.

    Raises:
        AccessDenied: the actor may not restart serving. The right to deploy is not needed, because nothing new is
            deployed.
        DeployFailed: some applications did not start; the message names them.
    """
    started, region = time.perf_counter(), config.cluster.region
    versions = serving(read_states(ledger), read_histories(ledger), registry)
    whole = Resource(kind="cluster", name="serving", region=region, serves=True)
    models = (replace(version.resource(region=region), serves=True) for version in versions)
    actor.check(Action.restart_serving, whole, *models)
    wait_for_recovery([*map(app_name, versions), *APPLICATIONS])
    restored_apps: list[str] = []
    failed: list[str] = []
    for version in versions:
        app = app_name(version)
        with _collect_failure(app, failed):
            app_config = with_deployed_settings(config, app) if config.as_deployed else config
            ensure_model(app_config, version, actor=actor.name)
            wait_until_applied(config, ledger, ledger.head(), app=app)
            restored_apps.append(app)
            print(f"restored {app}")
    with _collect_failure("features or outcomes", failed):
        (restore_shared_apps if config.as_deployed else ensure_shared_apps)(config)
    event = ServingRestored(applications=restored_apps, failed=failed, seconds=time.perf_counter() - started)
    ledger.append(event, actor=actor.name)
    if failed:
        raise DeployFailed(f"{', '.join(failed)} did not start; the others serve. See the messages above.")


def serving(states: States, histories: Mapping[str, History], registry: Registry) -> list[ModelVersion]:
    """Return the versions that must run according to the ledger.

    These are champions, running treatments and shadows of all models, and after them the deployed versions that a
    rollback of a promotion needs: they answer no request now.
    """
    wanted: dict[tuple[str, int], None] = {}  # a set in order
    predecessors: dict[tuple[str, int], None] = {}
    for name, state in states.items():
        candidates = (
            state.champion_version,
            state.rollout.treatment_version if state.rollout else None,
            state.shadow.version if state.shadow else None,
        )
        wanted |= {(name, number): None for number in candidates if number is not None}
        predecessor = histories.get(name, History()).warm_predecessor(utc_now())
        if predecessor is not None and predecessor in state.apps:
            predecessors[name, predecessor] = None
    return [registry.get(name, number) for name, number in wanted | predecessors]


@contextlib.contextmanager
def _collect_failure(app: str, failed: list[str]) -> Iterator[None]:
    """If an application does not start, print the error and append its name to `failed`, without raising the error."""
    try:
        yield
    except (FalajError, RayError) as error:
        print(f"{app} did not start: {error}", file=sys.stderr)
        failed.append(app)


if __name__ == "__main__":
    main()
