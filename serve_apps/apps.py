"""Serve applications, and what it takes to have one running."""

from __future__ import annotations

from ray import serve
from ray.serve.schema import ApplicationStatus

from cluster.errors import ArtifactTampered, FalajError
from cluster.ledger import open_ledger
from cluster.registry import ModelVersion, Registry
from cluster.settings import PlatformConfig, to_plain
from cluster.storage import layout
from serve_apps.as_deployed import keep_settings
from serve_apps.edge.config import FEATURES_APP, OUTCOMES_APP
from serve_apps.features.features import Features
from serve_apps.outcomes.outcomes import Outcomes
from serve_apps.predictor.predictor import Predictor
from serve_apps.scaling import replicas

GRACE_S = 5.0
HEALTH_PERIOD_S = 2.0
LOGGING = {"enable_access_log": False}
"""Each answer is in the edge's access log. Serve's own holds a thousand lines back in throughput mode, and then writes
them down at once in the event loop: every thousandth request waited 20 ms for it."""


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
        predictor = serve.deployment(
            Predictor,
            name="predictor",
            graceful_shutdown_timeout_s=GRACE_S,
            health_check_period_s=HEALTH_PERIOD_S,
            logging_config=LOGGING,
            **replicas(config.replica),
        )
        _run(name, predictor.bind(to_plain(config), version.name, version.version))  # type: ignore[attr-defined]
        keep_settings(config, name)
    return name


def ensure_common(config: PlatformConfig) -> None:
    """Have the applications running that belong to no model: outcomes and features."""
    for name, kind in ((OUTCOMES_APP, Outcomes), (FEATURES_APP, Features)):
        if not is_running(name):
            deployed = serve.deployment(
                kind,
                name=name,
                ray_actor_options={"num_cpus": 0.1},
                graceful_shutdown_timeout_s=GRACE_S,
                health_check_period_s=HEALTH_PERIOD_S,
                logging_config=LOGGING,
            )
            _run(name, deployed.bind(to_plain(config)))  # type: ignore[attr-defined]


def _run(name: str, app: serve.Application) -> None:
    try:
        serve.run(app, name=name, route_prefix=f"/{name}", blocking=False)
    except RuntimeError as error:
        message = _why_failed(name) or str(error)
        serve.delete(name, _blocking=False)
        if ArtifactTampered.__name__ in message:
            raise ArtifactTampered(
                f"The replica of {name} refused its files. See the ledger's ArtifactRefused."
            ) from error
        raise DeployFailed(f"Application {name} did not start: {message}") from error


def _why_failed(name: str) -> str:
    """What Serve says of an application's deployments; only there a replica's own error is named."""
    status = serve.status().applications.get(name)
    if status is None:
        return ""
    return "\n".join([status.message, *(one.message for one in status.deployments.values() if one.message)])
