"""The settings that each application was deployed with, so that it comes back as it was.

They are not in the ledger: they say how an application runs on this machine, not what is served.
"""

from __future__ import annotations

import json

from cluster.errors import ConfigError
from cluster.settings import PlatformConfig, from_plain, to_plain
from cluster.storage import exists, layout, read_bytes, write_bytes

SECTIONS = ("replica", "online")
IDENTITY = ("purpose", "service_token_file")
"""Of the section `identity`: what a replica reads for, and whose token it shows. Both may be stated at a deployment
alone."""


def keep_settings(config: PlatformConfig, app: str) -> None:
    """Write down what an application was deployed with."""
    plain = to_plain(config)
    kept = {name: plain[name] for name in SECTIONS}
    kept["identity"] = {name: value for name in IDENTITY if (value := plain["identity"][name]) is not None}
    write_bytes(_path(config, app), json.dumps(kept).encode())


def as_deployed(config: PlatformConfig, app: str) -> PlatformConfig:
    """The configuration with the settings that an application was deployed with; as it is where none were kept.

    Raises:
        ConfigError: this release does not understand them, or they are damaged.
    """
    path = _path(config, app)
    plain = to_plain(config)
    try:
        kept = json.loads(read_bytes(path)) if exists(path) else {}
    except ValueError:
        raise ConfigError(
            f"{path} is damaged, so nobody knows what {app} was deployed with. Deploy it again with its settings."
        ) from None
    return from_plain(plain | kept | {"identity": plain["identity"] | kept.get("identity", {})})


def _path(config: PlatformConfig, app: str) -> str:
    return layout(config.storage).serving(app)
