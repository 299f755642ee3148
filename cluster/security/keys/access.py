"""How a process comes to its keys: plain data that workers are given, opened once in each process."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from cluster.security.identity import current_actor
from cluster.security.keys.client import BrokerKeyStore
from cluster.security.keys.store import KeyStore
from cluster.security.parquet import ProtectedFiles
from cluster.security.policy import Role
from cluster.security.token_source import TokenSource
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.storage import resolve


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAccess:
    """Where the key broker listens, and as whom to ask it."""

    socket: str
    token: TokenSource


def key_access(config: PlatformConfig, record: ClusterRecord) -> KeyAccess:
    """The access of a job: with the token it was given, or as the user of this machine."""
    identity = config.identity
    if identity.token_file is not None:
        return KeyAccess(socket=record.key_socket, token=TokenSource(file=resolve(identity.token_file)))
    return KeyAccess(
        socket=record.key_socket,
        token=TokenSource(
            root=record.storage_root,
            subject=current_actor(),
            role=Role(identity.role),
            purpose=identity.purpose,
        ),
    )


def service_access(record: ClusterRecord, *, name: str) -> KeyAccess:
    """The access of a replica: as the service that it is, whoever deployed it."""
    token = TokenSource(root=record.storage_root, subject=f"service:{name}", role=Role.service)
    return KeyAccess(socket=record.key_socket, token=token)


@functools.lru_cache(maxsize=16)
def key_store(access: KeyAccess) -> KeyStore:
    """The key store; one connection in a process."""
    return BrokerKeyStore(Path(access.socket), access.token.token)


@functools.lru_cache(maxsize=16)
def protected_files(access: KeyAccess) -> ProtectedFiles:
    """Reader and writer of protected files; it keeps unwrapped keys for a minute."""
    return ProtectedFiles(key_store(access))
