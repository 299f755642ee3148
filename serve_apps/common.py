"""`python -m serve_apps.common`: Serve, and the applications that belong to no model; a program of `cluster.up`.

`features` and `outcomes` are there as soon as the cluster is. They run with the settings that the cluster was started
with. A deployment that states others (another online store, outcomes on disk before they are answered, another file
with the replicas' token) has them restarted with those, and a later one that states none leaves them so. They keep them
where the cluster gets a new head in the place of one that is lost.
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
from cluster.features_config import FeaturesConfig
from cluster.session import ClusterRecord, attach, recorded
from cluster.settings import Durability, OnlineConfig, OnlineKind, PlatformConfig, to_plain
from cluster.storage import layout, local, write_json
from serve_apps.apps import OPTIONS, DeployFailed, is_running, run
from serve_apps.edge.haproxy.config import FEATURES_APP, OUTCOMES_APP
from serve_apps.features.features import Features
from serve_apps.outcomes.outcomes import Outcomes

_CLUSTER = "cluster_id"
KINDS: dict[str, Any] = {OUTCOMES_APP: Outcomes, FEATURES_APP: Features}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What of the configuration these applications rest on."""

    online: dict[str, Any]
    """Fields of `OnlineConfig`; of its kind the value."""
    durability: str
    service_token_file: str | None
    max_ahead_s: float = FeaturesConfig().max_ahead_s
    """Of `FeaturesConfig`; an earlier release kept none."""

    @classmethod
    def of(cls, config: PlatformConfig) -> Settings:
        """Those that a configuration states."""
        return cls(
            online={**asdict(config.online), "kind": config.online.kind.value},
            durability=config.replica.durability.value,
            service_token_file=config.identity.service_token_file,
            max_ahead_s=config.features.max_ahead_s,
        )

    def over(self, kept: Settings) -> Settings:
        """These in the place of others: what is left at its default stays as it was, and `disk` stays `disk`."""
        default = Settings.of(PlatformConfig())
        strict = Durability.disk.value in (self.durability, kept.durability)
        return Settings(
            online=kept.online if self.online == default.online else self.online,
            durability=Durability.disk.value if strict else self.durability,
            service_token_file=self.service_token_file or kept.service_token_file,
            max_ahead_s=kept.max_ahead_s if self.max_ahead_s == default.max_ahead_s else self.max_ahead_s,
        )

    def put_into(self, config: PlatformConfig) -> PlatformConfig:
        """The configuration with these."""
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
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=config.cluster.ports.serve_http))
    if config.identity.issuer.url is not None and settings.service_token_file is None:
        print(
            "features and outcomes start with the first deployment, which has identity.service_token_file=…"
        )
        return
    try:
        run_common(config, record, settings)
    except DeployFailed as error:  # a Redis that is down, say, which must not keep the rest from starting
        print(
            f"warning: {error} Start it with `python -m serve_apps.deploy action=restore`.", file=sys.stderr
        )


def settings_at_start(config: PlatformConfig, record: ClusterRecord) -> Settings:
    """What the applications are started with: in this cluster's second head what they had in its first, else what the
    cluster is started with."""
    kept = _kept(config, record)
    if kept is None:
        _path(config).unlink(missing_ok=True)
    return Settings.of(config) if kept is None else kept


def ensure_common(config: PlatformConfig) -> None:
    """Have the applications running, with the settings that this configuration states.

    Raises:
        DeployFailed: naming the one that did not start.
    """
    record = recorded(config)
    kept, stated = _kept(config, record), Settings.of(config)
    wanted = stated if kept is None else stated.over(kept)
    if (kept is not None and wanted != kept) or not all(map(is_running, KINDS)):
        run_common(config, record, wanted)


def restore_common(config: PlatformConfig) -> None:
    """Have the applications running with the settings that they had, whatever this configuration states.

    Raises:
        DeployFailed: naming the one that did not start.
    """
    if not all(map(is_running, KINDS)):
        record = recorded(config)
        run_common(config, record, _kept(config, record) or Settings.of(config))


def run_common(config: PlatformConfig, record: ClusterRecord, settings: Settings) -> None:
    """Start the applications, or start them anew with other settings; both at once.

    Raises:
        DeployFailed: naming the one that did not start.
    """
    plain = to_plain(settings.put_into(config))
    deployments = {
        name: serve.deployment(
            kind, name=name, ray_actor_options={"num_cpus": 0.1}, max_surge_percent=100, **OPTIONS
        )
        for name, kind in KINDS.items()
    }
    run({name: one.bind(plain) for name, one in deployments.items()})  # type: ignore[attr-defined]
    write_json(str(_path(config)), {_CLUSTER: record.cluster_id, **asdict(settings)})


def _kept(config: PlatformConfig, record: ClusterRecord) -> Settings | None:
    """The settings that the applications were started with in this cluster; None where they were not, or by an earlier
    release, or where the file is damaged: that must not keep a cluster from starting."""
    path = _path(config)
    try:
        kept = json.loads(path.read_text()) if path.exists() else {}
        return Settings(**kept) if kept.pop(_CLUSTER, None) == record.cluster_id else None
    except (ValueError, TypeError, AttributeError):
        print(f"warning: {path} is damaged and counts as missing.", file=sys.stderr)
        return None


def _path(config: PlatformConfig) -> Path:
    return local(layout(config.storage).edge) / "common.json"


if __name__ == "__main__":
    main()
