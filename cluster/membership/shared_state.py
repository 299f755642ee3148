"""The state that all nodes share, and where it may be."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.host.names import is_loopback_host
from cluster.settings import OnlineKind, PlatformConfig
from cluster.storage import is_uri

REACHABLE = "(an address that every node reaches)"


class _Problem(NamedTuple):
    """State that other nodes do not reach."""

    reason: str
    remedy: str
    """Options that mend it."""


def require_shared_state(config: PlatformConfig) -> None:
    """Require that all state that several nodes use is where every node reaches it.

    Raises:
        ConfigError: the ledger, the storage root or the online store is on the head only.
    """
    problems = _problems(config)
    if not problems:
        return
    raise ConfigError(
        f"A second node cannot join, because {', and '.join(each.reason for each in problems)}. Run "
        f"`python -m cluster.down` on the head, then `python -m cluster.up` with "
        f"{', '.join(each.remedy for each in problems)}."
    )


def _problems(config: PlatformConfig) -> list[_Problem]:
    problems = []
    url = sa.engine.make_url(config.ledger.url or "sqlite://")
    if url.get_backend_name() == "sqlite":
        problems.append(_Problem("the ledger is SQLite", "ledger.url=postgresql+psycopg://…"))
    elif is_loopback_host(ledger_host := url.host or "localhost"):
        problems.append(_Problem(f"ledger.url names {ledger_host}", f"ledger.url=… {REACHABLE}"))
    if not is_uri(config.storage.root):
        problems.append(_Problem("storage.root is a folder of the head", "storage=s3 storage.root=s3://…"))
    online_host = urlsplit(config.online.url).hostname or ""
    if config.online.kind is not OnlineKind.redis:
        problems.append(_Problem("the online store is LMDB", "online=redis online.url=…"))
    elif is_loopback_host(online_host):
        problems.append(_Problem(f"online.url names {online_host}", f"online.url=… {REACHABLE}"))
    return problems
