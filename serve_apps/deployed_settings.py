"""Store the settings that each application was deployed with, so that a restore can use them again.

These settings are not in the ledger, because they say how an application runs on this machine, not what it serves.
"""

from __future__ import annotations

import json

from cluster.errors import ConfigError
from cluster.settings import PlatformConfig
from cluster.settings_conversion import from_plain, to_plain
from cluster.storage import exists, layout, read_bytes, write_bytes

SECTIONS = ("replica", "online")
IDENTITY_FIELDS = ("purpose", "service_token_file")
"""Stored fields of the section `identity`: the purpose for which a replica reads, and the file with its token. If
they were set only on the command line of the deployment, a restore cannot find them in the configuration files."""


def store_settings(config: PlatformConfig, app: str) -> None:
    """Store the settings that an application was deployed with."""
    plain = to_plain(config)
    settings = {name: plain[name] for name in SECTIONS}
    identity = plain["identity"]
    settings["identity"] = {name: identity[name] for name in IDENTITY_FIELDS if identity[name] is not None}
    write_bytes(_path(config, app), json.dumps(settings).encode())


def with_deployed_settings(config: PlatformConfig, app: str) -> PlatformConfig:
    """Return the configuration with the stored settings of an application. If none are stored, return it unchanged.

    Raises:
        ConfigError: this release does not know the stored settings, or the file is damaged.
    """
    path = _path(config, app)
    plain = to_plain(config)
    try:
        stored = json.loads(read_bytes(path)) if exists(path) else {}
    except ValueError:
        raise ConfigError(
            f"{path} is damaged, so the settings of {app} are unknown. Deploy it again with its settings."
        ) from None
    return from_plain(plain | stored | {"identity": plain["identity"] | stored.get("identity", {})})


def idle_cost(config: PlatformConfig, app: str) -> dict[str, float]:
    """Return what an application without requests holds: its smallest number of replicas, and their CPUs and GPUs.

    Raises:
        ConfigError: the stored settings are damaged.
    """
    replica = with_deployed_settings(config, app).replica
    replicas = replica.min_replicas if replica.num_replicas is None else replica.num_replicas
    return {
        "replicas": replicas,
        "cpus": replicas * replica.num_cpus,
        "gpus": replicas * replica.num_gpus,
    }


def _path(config: PlatformConfig, app: str) -> str:
    return layout(config.storage).serving(app)
