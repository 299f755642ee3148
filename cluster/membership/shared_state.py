"""The state that all nodes share, and where it may be."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.host.this_node import is_loopback
from cluster.settings import OnlineKind, PlatformConfig
from cluster.storage import is_uri


def require_shared_state(config: PlatformConfig) -> None:
    """Require that all state that several nodes use is where every node reaches it.

    Raises:
        ConfigError: the ledger, the storage root or the online store is on the head only.
    """
    url = sa.engine.make_url(config.ledger.url or "sqlite://")
    if url.get_backend_name() == "sqlite":
        raise _not_shared("the ledger is SQLite", "ledger.url=postgresql+psycopg://…")
    if not is_uri(config.storage.root):
        raise _not_shared("storage.root is a folder of the head", "storage=s3 storage.root=s3://…")
    if config.online.kind is not OnlineKind.redis:
        raise _not_shared("the online store is LMDB", "online=redis online.url=…")
    hosts = {"ledger.url": url.host or "localhost", "online.url": urlsplit(config.online.url).hostname or ""}
    for option, host in hosts.items():
        if host == "localhost" or (re.fullmatch(r"[\d.]+", host) and is_loopback(host)):
            raise _not_shared(f"{option} names {host}", f"{option}=… with an address that every node reaches")


def _not_shared(problem: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"A second node cannot join, because {problem}. Run `python -m cluster.down` on the head, then "
        f"`python -m cluster.up` with {remedy}."
    )
