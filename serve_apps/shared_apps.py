"""`python -m serve_apps.shared_apps`: start Serve and the applications that belong to no model; `cluster.up` runs it.

`features` and `outcomes` start with the cluster, with the cluster's settings. A deployment with other settings (another
online store, outcomes on disk before they are answered, another file with the replicas' token) restarts them with
those. A later deployment without such settings leaves them unchanged. If the head is lost, the new
head starts them with the same settings.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions

from cluster.entrypoint import job
from cluster.host.this_node import LOOPBACK_ADDRESS
from cluster.placement import find_nodes, options
from cluster.security.tls.certificates import NODE_CERTIFICATE_NAME, NODE_KEY_NAME
from cluster.session import ClusterRecord, attach, require_recorded_cluster
from cluster.settings import Durability, FeaturesConfig, OnlineConfig, OnlineKind, PlatformConfig
from cluster.settings_conversion import to_plain
from cluster.storage import layout, local, write_json
from serve_apps.apps import OPTIONS, DeployFailed, is_running, run
from serve_apps.edge.haproxy.split import FEATURES_APP, OUTCOMES_APP
from serve_apps.replica.scaling import one_replica_per_node

_CLUSTER = "cluster_id"
APPLICATIONS = (OUTCOMES_APP, FEATURES_APP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the configuration that these applications use. The fields are the keys of the JSON file."""

    online: dict[str, Any]
    """Fields of `OnlineConfig`. `kind` is the value of the enum."""
    durability: str
    service_token_file: str | None
    max_ahead_s: float = FeaturesConfig().max_ahead_s
    """Field of `FeaturesConfig`. Files of earlier releases do not have it."""

    @classmethod
    def of(cls, config: PlatformConfig) -> Settings:
        """Take the settings from a configuration."""
        return cls(
            online={**asdict(config.online), "kind": config.online.kind.value},
            durability=config.replica.durability.value,
            service_token_file=config.identity.service_token_file,
            max_ahead_s=config.features.max_ahead_s,
        )

    def merged_over(self, stored: Settings) -> Settings:
        """Return these settings, with the stored value for each setting that has its default.

        Durability is the stronger of the two.
        """
        default = Settings.of(PlatformConfig())
        strength = [durability.value for durability in Durability]
        return Settings(
            online=stored.online if self.online == default.online else self.online,
            durability=max(self.durability, stored.durability, key=strength.index),
            service_token_file=self.service_token_file or stored.service_token_file,
            max_ahead_s=stored.max_ahead_s if self.max_ahead_s == default.max_ahead_s else self.max_ahead_s,
        )

    def apply_to(self, config: PlatformConfig) -> PlatformConfig:
        """Return the configuration with these settings."""
        online = OnlineConfig(**{**self.online, "kind": OnlineKind(self.online["kind"])})
        return replace(
            config,
            online=online,
            replica=replace(config.replica, durability=Durability(self.durability)),
            identity=replace(config.identity, service_token_file=self.service_token_file),
            features=replace(config.features, max_ahead_s=self.max_ahead_s),
        )


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Start Serve on the running head, then the applications."""
    record = attach(config)
    settings = settings_at_start(config, record)
    serve.start(http_options=serve_options(record, port=config.cluster.ports.serve_http))
    if config.identity.issuer.url is not None and settings.service_token_file is None:
        print(
            "features and outcomes start with the first deployment, which must give identity.service_token_file=…"
        )
        return
    known = serve.status().applications
    if all(name in known for name in APPLICATIONS):
        return  # a new head continued with the state of the lost one; the supervisor restores what does not recover
    try:
        run_shared_apps(config, record, settings)
    except DeployFailed as error:  # for example, Redis is down: the rest of the cluster must still start
        print(
            f"warning: {error} Start it with `python -m serve_apps.deploy action=restore`.", file=sys.stderr
        )


def serve_options(record: ClusterRecord, *, port: int) -> HTTPOptions:
    """Return the options of Serve's proxy, which runs on the head. Replicas take their own node's host and certificate.

    On loopback it speaks plain HTTP, on every other address TLS.
    """
    if not record.has_nodes:
        return HTTPOptions(host=LOOPBACK_ADDRESS, port=port)
    tls = Path(record.layout.tls)
    return HTTPOptions(
        host=record.address,
        port=port,
        ssl_certfile=str(tls / NODE_CERTIFICATE_NAME),
        ssl_keyfile=str(tls / NODE_KEY_NAME),
    )


def settings_at_start(config: PlatformConfig, record: ClusterRecord) -> Settings:
    """Return the settings that this cluster's previous head has stored, or else the settings of the configuration."""
    stored = _stored_settings(config, record)
    if stored is None:
        _path(config).unlink(missing_ok=True)
    return Settings.of(config) if stored is None else stored


def ensure_shared_apps(config: PlatformConfig) -> None:
    """Start the applications with this configuration's settings, or restart them if the settings changed.

    Raises:
        DeployFailed: an application did not start; the message names it.
    """
    record = require_recorded_cluster(config)
    stored, settings = _stored_settings(config, record), Settings.of(config)
    if stored is not None:
        settings = settings.merged_over(stored)
    changed = stored is not None and settings != stored
    if changed or not all(map(is_running, APPLICATIONS)):
        run_shared_apps(config, record, settings)


def restore_shared_apps(config: PlatformConfig) -> None:
    """Start the applications with their stored settings, not with the settings of this configuration.

    Raises:
        DeployFailed: an application did not start; the message names it.
    """
    if not all(map(is_running, APPLICATIONS)):
        record = require_recorded_cluster(config)
        run_shared_apps(config, record, _stored_settings(config, record) or Settings.of(config))


def run_shared_apps(config: PlatformConfig, record: ClusterRecord, settings: Settings) -> None:
    """Start or restart both applications at the same time, and store their settings.

    Raises:
        DeployFailed: an application did not start; the message names it.
    """
    # Imported here, because a deployment mostly finds both running, and they import Polars and delta-rs.
    from serve_apps.features.features import Features
    from serve_apps.outcomes.outcomes import Outcomes

    classes: dict[str, Any] = {OUTCOMES_APP: Outcomes, FEATURES_APP: Features}
    actor_options = {"num_cpus": 0.1, **options(find_nodes(config.placement))}
    # With several nodes, a node has room for one replica, so an old one ends before the new one starts.
    one_per_node = record.has_nodes and config.placement.region is None
    replicas = one_replica_per_node() if one_per_node else {"max_surge_percent": 100}
    plain = to_plain(settings.apply_to(config))
    deployments = {
        name: serve.deployment(
            kind,
            name=name,
            ray_actor_options=actor_options,
            **OPTIONS,
            **replicas,
        )
        for name, kind in classes.items()
    }
    run({name: deployment.bind(plain) for name, deployment in deployments.items()})  # type: ignore[attr-defined]
    write_json(str(_path(config)), {_CLUSTER: record.cluster_id, **asdict(settings)})


def _stored_settings(config: PlatformConfig, record: ClusterRecord) -> Settings | None:
    """Return the settings that the applications were last started with in this cluster.

    The result is None if they were not started, if an earlier release started them, or if the file is damaged. A
    damaged file must not prevent the start of a cluster.
    """
    path = _path(config)
    try:
        stored = json.loads(path.read_text()) if path.exists() else {}
        return Settings(**stored) if stored.pop(_CLUSTER, None) == record.cluster_id else None
    except (ValueError, TypeError, AttributeError):
        print(f"warning: {path} is damaged and counts as missing.", file=sys.stderr)
        return None


def _path(config: PlatformConfig) -> Path:
    return local(layout(config.storage).edge) / "common.json"


if __name__ == "__main__":
    main()
