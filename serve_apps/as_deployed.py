"""The settings that each application was deployed with, so that it comes back as it was.

They are not in the ledger: they say how an application runs on this machine, not what is served.
"""

from __future__ import annotations

import json

from cluster.settings import PlatformConfig, from_plain, to_plain
from cluster.storage import exists, layout, read_bytes, write_bytes

SECTIONS = ("replica", "online")
IDENTITY = ("service_token_file", "purpose")
"""As whom the replicas act; the rest of that section is about who deploys."""


def keep_settings(config: PlatformConfig, app: str) -> None:
    """Write down what an application was deployed with."""
    plain = to_plain(config)
    content = {name: plain[name] for name in SECTIONS}
    content["identity"] = {name: plain["identity"][name] for name in IDENTITY}
    write_bytes(_path(config, app), json.dumps(content).encode())


def as_deployed(config: PlatformConfig, app: str) -> PlatformConfig:
    """The configuration with the settings that an application was deployed with; as it is where none were kept.

    Raises:
        ConfigError: this release does not understand them.
    """
    path = _path(config, app)
    kept = json.loads(read_bytes(path)) if exists(path) else {}
    plain = to_plain(config)
    identity = plain["identity"] | kept.get("identity", {})
    return from_plain(plain | kept | {"identity": identity})


def _path(config: PlatformConfig, app: str) -> str:
    return layout(config.storage).serving(app)
