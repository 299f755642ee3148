"""Start and remove Serve applications. `serve_apps/shared_apps.py` starts the applications that belong to no model."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from cluster import placement
from cluster.errors import ArtifactTampered, FalajError
from cluster.ledger import open_ledger
from cluster.registry import ModelVersion, Registry
from cluster.settings import PlatformConfig
from cluster.settings_conversion import to_plain
from cluster.storage import check_durability, layout
from serve_apps.deployed_settings import store_settings
from serve_apps.replica.scaling import replica_options

GRACE_S = 5.0
HEALTH_PERIOD_S = 2.0
POLL_S = 0.05
"""Seconds between two checks of starting applications. Serve's own function checks once a second."""
LOGGING = {"enable_access_log": False}
"""Serve's own access log is not needed, because the edge's access log has every answer. In throughput mode, Serve's log
buffers a thousand lines and then writes them in the event loop. Every thousandth request waited 20 ms for this."""
OPTIONS: dict[str, Any] = {
    "graceful_shutdown_timeout_s": GRACE_S,
    "health_check_period_s": HEALTH_PERIOD_S,
    "logging_config": LOGGING,
}
"""Options of every deployment."""
RECOVERY_S = 60.0
"""Longest wait until Serve has started the replicas that were lost with the head."""
RECOVERY_POLL_S = 0.5
_RECOVERING = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY)


class DeployFailed(FalajError):
    """An application did not become healthy."""


def app_name(version: ModelVersion) -> str:
    """Return the name of a model version's Serve application."""
    return f"{version.name}-v{version.version}"


def is_running(name: str) -> bool:
    """Return whether an application is healthy."""
    app = serve.status().applications.get(name)
    return app is not None and app.status == ApplicationStatus.RUNNING


def wait_for_recovery(names: Collection[str], *, timeout_s: float = RECOVERY_S) -> None:
    """Wait until no application that Serve knows is starting or unhealthy, or the time is over.

    After the head was replaced, Serve itself starts the replicas that were lost. If `deploy` started their applications
    again meanwhile, Serve would also replace the replicas that still run.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        known = serve.status().applications
        if not any(name in known and known[name].status in _RECOVERING for name in names):
            return
        time.sleep(RECOVERY_POLL_S)


def ensure_model(config: PlatformConfig, version: ModelVersion, *, actor: str) -> str:
    """Start the application of a model version if it does not run, and return the application's name.

    Args:
        config: the platform's configuration.
        version: the version to serve.
        actor: name in the ledger event, if the version's files are refused.

    Raises:
        ArtifactTampered: a file was altered; nothing is started, and running applications are not affected.
        DeployFailed: a replica did not start.
        ConfigError: records cannot be as durable as configured.
    """
    check_durability(config)
    name = app_name(version)
    if not is_running(name):
        # Imported here, because commands that find the application running, or remove it, need no replica's code.
        from serve_apps.predictor.predictor import Predictor

        Registry(open_ledger(config), layout(config.storage)).check_files(version, actor=actor)
        options = OPTIONS | replica_options(config.replica)
        options["ray_actor_options"] |= placement.options(placement.find_nodes(config.placement))
        predictor = serve.deployment(Predictor, name="predictor", **options)
        bound = predictor.bind(to_plain(config), version.name, version.version)  # type: ignore[attr-defined]
        run({name: bound})
        store_settings(config, name)
    return name


def remove_app(name: str) -> bool:
    """Remove an application and its replicas; return whether it existed."""
    if name not in serve.status().applications:
        return False
    serve.delete(name)
    return True


def run(apps: Mapping[str, serve.Application]) -> None:
    """Start or restart applications, all at the same time, and wait until they are healthy.

    If an application does not start, it is removed. But if it ran before, its old replicas continue to serve.

    Raises:
        ArtifactTampered: a replica refused its model's files.
        DeployFailed: an application did not start; the message has its name and the reason.
    """
    running_before = {name for name in apps if is_running(name)}
    try:
        targets = [serve.RunTarget(app, name, f"/{name}") for name, app in apps.items()]
        serve.run_many(targets, wait_for_applications_running=False)
        _wait_until_running(apps)
    except RuntimeError as error:
        failed = [name for name in apps if not is_running(name)]
        messages = {name: _failure_message(name) or str(error) for name in failed}
        for name in set(failed) - running_before:
            serve.delete(name, _blocking=False)
        reasons = "; ".join(f"Application {name} did not start: {text}" for name, text in messages.items())
        reasons = reasons or f"Serve did not start {', '.join(apps)}: {error}"
        if ArtifactTampered.__name__ in reasons:
            raise ArtifactTampered(
                f"The replica of {', '.join(failed)} refused its files. See the ledger's ArtifactRefused."
            ) from error
        raise DeployFailed(reasons) from error


def _wait_until_running(names: Iterable[str]) -> None:
    """Wait until all applications are healthy. Serve's controller ends a start that takes too long.

    Raises:
        RuntimeError: an application did not start, or was removed meanwhile.
    """
    waiting = set(names)
    while waiting:
        applications = serve.status().applications
        for name in sorted(waiting):
            app = applications.get(name)
            if app is None:
                raise RuntimeError(f"application {name} was removed while it started")
            if app.status is ApplicationStatus.DEPLOY_FAILED:
                raise RuntimeError(f"application {name} failed: {app.message}")
            if app.status is ApplicationStatus.RUNNING:
                waiting.discard(name)
        if waiting:
            time.sleep(POLL_S)


def _failure_message(name: str) -> str:
    """Return Serve's messages about an application and its deployments. Only they contain the error of a replica."""
    status = serve.status().applications.get(name)
    if status is None:
        return ""
    messages = (deployment.message for deployment in status.deployments.values() if deployment.message)
    return "\n".join([status.message, *messages])
