"""Serve applications, and what it takes to have one running; those of no model are in `serve_apps/common.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from cluster.errors import ArtifactTampered, FalajError
from cluster.ledger import open_ledger
from cluster.registry import ModelVersion, Registry
from cluster.settings import PlatformConfig, to_plain
from cluster.storage import layout
from serve_apps.as_deployed import keep_settings
from serve_apps.predictor.predictor import Predictor
from serve_apps.replica.scaling import replicas

GRACE_S = 5.0
HEALTH_PERIOD_S = 2.0
LOGGING = {"enable_access_log": False}
"""Each answer is in the edge's access log. Serve's own holds a thousand lines back in throughput mode, and then writes
them down at once in the event loop: every thousandth request waited 20 ms for it."""
OPTIONS: dict[str, Any] = {
    "graceful_shutdown_timeout_s": GRACE_S,
    "health_check_period_s": HEALTH_PERIOD_S,
    "logging_config": LOGGING,
}
"""Of every deployment."""


class DeployFailed(FalajError):
    """An application did not become healthy."""


def app_name(version: ModelVersion) -> str:
    """The Serve application of a model version."""
    return f"{version.name}-v{version.version}"


def is_running(name: str) -> bool:
    """Whether an application is healthy."""
    app = serve.status().applications.get(name)
    return app is not None and app.status == ApplicationStatus.RUNNING


def ensure_model(config: PlatformConfig, version: ModelVersion, *, actor: str) -> str:
    """Have a model version's application running; gives its name.

    Args:
        config: the platform's.
        version: which.
        actor: who is named should its files be refused.

    Raises:
        ArtifactTampered: before anything is started; what serves now goes on serving.
        DeployFailed: a replica did not start.
    """
    name = app_name(version)
    if not is_running(name):
        Registry(open_ledger(config), layout(config.storage)).check_files(version, actor=actor)
        predictor = serve.deployment(Predictor, name="predictor", **OPTIONS, **replicas(config.replica))
        bound = predictor.bind(to_plain(config), version.name, version.version)  # type: ignore[attr-defined]
        run({name: bound})
        keep_settings(config, name)
    return name


def remove_app(name: str) -> bool:
    """End an application and its replicas; says whether there was one."""
    if name not in serve.status().applications:
        return False
    serve.delete(name)
    return True


def run(apps: Mapping[str, serve.Application]) -> None:
    """Start applications, or start them anew, all at once, and wait until they answer.

    One that does not start is removed, unless it ran before: its old replicas go on serving.

    Raises:
        ArtifactTampered: a replica refused its model's files.
        DeployFailed: naming the application and why.
    """
    before = {name for name in apps if is_running(name)}
    try:
        serve.run_many([serve.RunTarget(app, name, f"/{name}") for name, app in apps.items()])
    except RuntimeError as error:
        failed = [name for name in apps if not is_running(name)]
        messages = {name: _why_failed(name) or str(error) for name in failed}
        for name in set(failed) - before:
            serve.delete(name, _blocking=False)
        said = "; ".join(f"Application {name} did not start: {message}" for name, message in messages.items())
        said = said or f"Serve did not start {', '.join(apps)}: {error}"
        if ArtifactTampered.__name__ in said:
            raise ArtifactTampered(
                f"The replica of {', '.join(failed)} refused its files. See the ledger's ArtifactRefused."
            ) from error
        raise DeployFailed(said) from error


def _why_failed(name: str) -> str:
    """What Serve says of an application's deployments; only there a replica's own error is named."""
    status = serve.status().applications.get(name)
    if status is None:
        return ""
    return "\n".join([status.message, *(one.message for one in status.deployments.values() if one.message)])
