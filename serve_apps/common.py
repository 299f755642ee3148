"""`python -m serve_apps.common`: Serve, and the applications that belong to no model; a program of `cluster.up`.

`features` and `outcomes` are there as soon as the cluster is. They run with the settings that the cluster was started
with. A deployment that states others (another online store, outcomes on disk before they are answered, another file
with the replicas' token) has them restarted with those, and a later one that states none leaves them so. So does a
lost Ray head: its applications come back with the settings that they had. A new cluster begins with its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions

from cluster.entrypoint import job
from cluster.session import attach, find_record
from cluster.settings import Durability, OnlineConfig, OnlineKind, PlatformConfig, to_plain
from cluster.storage import exists, layout, read_bytes, write_bytes
from serve_apps.apps import OPTIONS, DeployFailed, is_running, run
from serve_apps.edge.config import FEATURES_APP, OUTCOMES_APP
from serve_apps.features.features import Features
from serve_apps.outcomes.outcomes import Outcomes

KINDS: dict[str, Any] = {OUTCOMES_APP: Outcomes, FEATURES_APP: Features}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What of the configuration these applications rest on."""

    online: dict[str, Any]
    """Fields of `OnlineConfig`; of its kind the value."""
    durability: str
    service_token_file: str | None

    @classmethod
    def of(cls, config: PlatformConfig) -> Settings:
        """Those that a configuration states."""
        return cls(
            online={**asdict(config.online), "kind": config.online.kind.value},
            durability=config.replica.durability.value,
            service_token_file=config.identity.service_token_file,
        )

    def over(self, kept: Settings) -> Settings:
        """These in the place of others: what is left at its default stays as it was, and `disk` stays `disk`."""
        default = Settings.of(PlatformConfig())
        strict = Durability.disk.value in (self.durability, kept.durability)
        return Settings(
            online=kept.online if self.online == default.online else self.online,
            durability=Durability.disk.value if strict else self.durability,
            service_token_file=self.service_token_file or kept.service_token_file,
        )

    def put_into(self, config: PlatformConfig) -> PlatformConfig:
        """The configuration with these."""
        online = OnlineConfig(**{**self.online, "kind": OnlineKind(self.online["kind"])})
        return replace(
            config,
            online=online,
            replica=replace(config.replica, durability=Durability(self.durability)),
            identity=replace(config.identity, service_token_file=self.service_token_file),
        )


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Start Serve on the running head, then the applications."""
    attach(config)
    settings = kept_settings(config) or Settings.of(config)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=config.cluster.ports.serve_http))
    if config.identity.issuer.url is not None and settings.service_token_file is None:
        print(
            "features and outcomes start with the first deployment, which has identity.service_token_file=…"
        )
        return
    try:
        run_common(config, settings)
    except DeployFailed as error:  # a Redis that is down, say, which must not keep the rest from starting
        print(
            f"warning: {error} Start it with `python -m serve_apps.deploy action=restore`.", file=sys.stderr
        )


def ensure_common(config: PlatformConfig) -> None:
    """Have the applications running, with the settings that this configuration states.

    Raises:
        DeployFailed: naming the one that did not start.
    """
    kept, stated = kept_settings(config), Settings.of(config)
    wanted = stated if kept is None else stated.over(kept)
    if (kept is not None and wanted != kept) or not all(map(is_running, KINDS)):
        run_common(config, wanted)


def restore_common(config: PlatformConfig) -> None:
    """Have the applications running with the settings that they had, whatever this configuration states.

    Raises:
        DeployFailed: naming the one that did not start.
    """
    if not all(map(is_running, KINDS)):
        run_common(config, kept_settings(config) or Settings.of(config))


def run_common(config: PlatformConfig, settings: Settings) -> None:
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
    keep_settings(config, settings)


def keep_settings(config: PlatformConfig, settings: Settings) -> None:
    """Write down what the applications of this cluster run with."""
    content = {"cluster_id": _cluster_id(config), "settings": asdict(settings)}
    write_bytes(_path(config), json.dumps(content).encode())


def kept_settings(config: PlatformConfig) -> Settings | None:
    """What the applications of this cluster run with; None where it has not started them yet."""
    if not exists(_path(config)):
        return None
    content = json.loads(read_bytes(_path(config)))
    return Settings(**content["settings"]) if content.get("cluster_id") == _cluster_id(config) else None


def _cluster_id(config: PlatformConfig) -> str:
    record = find_record(config.storage)
    return "" if record is None else record.cluster_id


def _path(config: PlatformConfig) -> str:
    return f"{layout(config.storage).edge}/common.json"


if __name__ == "__main__":
    main()
