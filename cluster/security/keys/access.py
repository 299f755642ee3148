"""Address and identity for the key broker, as plain data for workers. Each process opens its own connection.

A worker can run on another node than its job. There the paths are the node's own (`cluster/host/this_node.py`). A node
that joined has no development issuer and not the job's intent: it gets the tokens through its key broker's socket from
the head.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import FalajError
from cluster.host.this_node import this_node
from cluster.security.keys.client import BrokerKeyStore, ask_broker
from cluster.security.keys.store import KeyStore, KeyStoreUnavailable
from cluster.security.tokens.intent import read_intent
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import RENEW_S, TokenSource
from cluster.security.tokens.trust import Trust
from cluster.settings import IssuerConfig, PlatformConfig
from cluster.storage import Layout, resolve

if TYPE_CHECKING:
    from cluster.session import ClusterRecord

INTENT_RENEW_S = 60
"""Seconds for which a node uses an intent before it asks the head for a fresh one."""


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
    cluster_id: str = ""
    """The cluster, if it may have several nodes."""

    def here(self) -> KeyAccess:
        """Return this access with the paths of the node that this process runs on."""
        node = this_node(cluster_id=self.cluster_id) if self.cluster_id else None
        if node is None:
            return self
        token = replace(self.token, root=node.local_root) if self.token.root else self.token
        return replace(self, socket=node.key_socket, root=node.local_root, token=token)

    def token_reader(self) -> Callable[[], str]:
        """Return a function that returns a token that is valid now."""
        access = self.here()
        node = this_node(cluster_id=self.cluster_id) if self.cluster_id else None
        path = access.token.path()
        if node is None or node.is_head or (path is not None and path.exists()):
            return access.token.token
        return functools.partial(_token_from_head, access.socket, access.token)


def service_access(
    config: PlatformConfig, record: ClusterRecord, *, name: str, purpose: str = ""
) -> KeyAccess:
    """Return the key access of a replica. It acts as its own service identity, not as the user who deployed it."""
    if config.identity.service_token_file is not None:
        token = TokenSource(file=resolve(config.identity.service_token_file))
    else:
        token = TokenSource(
            root=record.layout.disk, subject=f"service:{name}", role=Role.service, purpose=purpose
        )
    return KeyAccess(
        socket=record.key_socket, token=token, owner=record.owner_uid, cluster_id=record.cluster_id
    )


@functools.lru_cache(maxsize=16)
def key_store(access: KeyAccess) -> KeyStore:
    """Return the key store, with one connection per process.

    Raises:
        Unauthenticated, ConfigError: the job's intent is not valid in this process.
    """
    token, here = access.token_reader(), access.here()
    if here.entrypoint and (path := here.token.path()) is not None:
        intents = Trust.of(here.issuer, Layout(here.root)).intents
        if here.token.intent and not path.exists():  # on a node that joined
            intents.verify(token(), entrypoint=here.entrypoint)
        else:
            read_intent(path, intents, entrypoint=here.entrypoint)
    return BrokerKeyStore(Path(here.socket), token, owner=here.owner)


def _token_from_head(socket: str, source: TokenSource) -> str:
    period = INTENT_RENEW_S if source.intent else RENEW_S
    return _fetched(socket, source, int(time.time()) // period)


@functools.lru_cache(maxsize=16)
def _fetched(socket: str, source: TokenSource, period: int) -> str:
    """Return a token from the head. Cached for one period.

    Raises:
        KeyStoreUnavailable: neither the broker of this node nor the head answers.
        FalajError: the head refuses.
    """
    if source.intent:
        request: dict[str, object] = {"op": "intent", "name": source.intent}
    else:
        request = {"op": "service_token", "subject": source.subject, "purpose": source.purpose}
    token = ask_broker(Path(socket), request)
    if not isinstance(token, str):
        error: FalajError = KeyStoreUnavailable("The head answered with no token.")
        raise error
    return token
