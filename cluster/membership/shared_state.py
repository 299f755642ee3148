"""The state that all nodes share, and where it may be."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.host.this_node import is_loopback
from cluster.settings import OnlineKind, PlatformConfig
from cluster.storage import is_uri

REACHABLE = "(an address that every node reaches)"


def require_shared_state(config: PlatformConfig) -> None:
    """Require that all state that several nodes use is where every node reaches it.

    Raises:
        ConfigError: the ledger, the storage root or the online store is on the head only.
    """
    problems = _problems(config)
    if not problems:
        return
    reasons, remedies = [problem for problem, _ in problems], [remedy for _, remedy in problems]
    raise ConfigError(
        f"A second node cannot join, because {', and '.join(reasons)}. Run `python -m cluster.down` on the head, then "
        f"`python -m cluster.up` with {', '.join(remedies)}."
    )


def _problems(config: PlatformConfig) -> list[tuple[str, str]]:
    """Return what other nodes do not reach, each with the options that mend it."""
    problems = []
    url = sa.engine.make_url(config.ledger.url or "sqlite://")
    if url.get_backend_name() == "sqlite":
        problems.append(("the ledger is SQLite", "ledger.url=postgresql+psycopg://…"))
    elif _is_local(url.host or "localhost"):
        problems.append((f"ledger.url names {url.host or 'localhost'}", f"ledger.url=… {REACHABLE}"))
    if not is_uri(config.storage.root):
        problems.append(("storage.root is a folder of the head", "storage=s3 storage.root=s3://…"))
    host = urlsplit(config.online.url).hostname or ""
    if config.online.kind is not OnlineKind.redis:
        problems.append(("the online store is LMDB", "online=redis online.url=…"))
    elif _is_local(host):
        problems.append((f"online.url names {host}", f"online.url=… {REACHABLE}"))
    return problems


def _is_local(host: str) -> bool:
    return host == "localhost" or (re.fullmatch(r"[\d.]+", host) is not None and is_loopback(host))
