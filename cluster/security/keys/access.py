"""Address and identity for the key broker, as plain data for workers. Each process opens its own connection."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.store import KeyStore
from cluster.security.tokens.intent import read_intent
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import TokenSource
from cluster.security.tokens.trust import Trust
from cluster.settings import IssuerConfig, PlatformConfig
from cluster.storage import Layout, resolve

if TYPE_CHECKING:
    from cluster.session import ClusterRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAccess:
    """Address of the key broker, and the identity for requests to it."""

    socket: str
    token: TokenSource
    entrypoint: str = ""
    """Entry point of the job, if the token is the job's intent. Each process of the job verifies the intent."""
    owner: int | None = None
    """Id of the user that runs the broker."""
    root: str = ""
    """Folder of the development issuer's keys (`Layout.disk`), if that issuer's tokens are accepted."""
    issuer: IssuerConfig = field(default_factory=IssuerConfig)


def service_access(
    config: PlatformConfig, record: ClusterRecord, *, name: str, purpose: str = ""
) -> KeyAccess:
    """Return the key access of a replica. A replica has its own service identity, whoever deployed it."""
    if config.identity.service_token_file is not None:
        token_file = TokenSource(file=resolve(config.identity.service_token_file))
        return KeyAccess(socket=record.key_socket, token=token_file, owner=record.owner_uid)
    token = TokenSource(
        root=record.layout.disk, subject=f"service:{name}", role=Role.service, purpose=purpose
    )
    return KeyAccess(socket=record.key_socket, token=token, owner=record.owner_uid)


@functools.lru_cache(maxsize=16)
def key_store(access: KeyAccess) -> KeyStore:
    """Return the key store, with one connection per process.

    Raises:
        Unauthenticated, ConfigError: the job's intent is not valid in this process.
    """
    if access.entrypoint and access.token.file is not None:
        intents = Trust.of(access.issuer, Layout(access.root)).intents
        read_intent(Path(access.token.file), intents, entrypoint=access.entrypoint)
    return BrokerKeyStore(Path(access.socket), access.token.token, owner=access.owner)
