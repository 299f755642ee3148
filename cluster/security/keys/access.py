"""How a process comes to its keys: plain data that workers are given, opened once in each process."""

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
    """Where the key broker listens, and as whom to ask it."""

    socket: str
    token: TokenSource
    entrypoint: str = ""
    """Of the job whose intent the token is; each of its processes checks that."""
    owner: int | None = None
    """The user that the broker runs as."""
    root: str = ""
    """Storage root of the dev issuer, where that is believed."""
    issuer: IssuerConfig = field(default_factory=IssuerConfig)


def service_access(
    config: PlatformConfig, record: ClusterRecord, *, name: str, purpose: str = ""
) -> KeyAccess:
    """The access of a replica: as the service that it is, whoever deployed it."""
    if config.identity.service_token_file is not None:
        given = TokenSource(file=resolve(config.identity.service_token_file))
        return KeyAccess(socket=record.key_socket, token=given, owner=record.owner_uid)
    token = TokenSource(
        root=record.storage_root, subject=f"service:{name}", role=Role.service, purpose=purpose
    )
    return KeyAccess(socket=record.key_socket, token=token, owner=record.owner_uid)


@functools.lru_cache(maxsize=16)
def key_store(access: KeyAccess) -> KeyStore:
    """The key store; one connection in a process.

    Raises:
        Unauthenticated, ConfigError: a job's intent does not hold in this process.
    """
    if access.entrypoint and access.token.file is not None:
        intents = Trust.of(access.issuer, Layout(access.root)).intents
        read_intent(Path(access.token.file), intents, entrypoint=access.entrypoint)
    return BrokerKeyStore(Path(access.socket), access.token.token, owner=access.owner)
