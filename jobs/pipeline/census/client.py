"""What the demo client needs to call the edge, like any other client: address, CA certificate and a token."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout

TOKEN_TTL_S = 900


class EdgeAccess(NamedTuple):
    """Values that a client needs to send requests to the edge."""

    url: str
    ssl_context: ssl.SSLContext
    """TLS context that trusts the CA of the installation."""
    headers: dict[str, str]
    """Authorization header with the client's token."""


def edge_access(config: PlatformConfig, *, purpose: str) -> EdgeAccess:
    """Sign a token for the demo client, and return the token with the edge's address and TLS context.

    Raises:
        ClusterNotRunning: No cluster is up.
    """
    record = require_running_cluster(config)
    places = layout(config.storage)
    context = ssl.create_default_context(cafile=f"{places.tls}/ca.pem")
    token = mint_token(places, subject="demo-app", role=Role.service, purpose=purpose, ttl_s=TOKEN_TTL_S)
    return EdgeAccess(record.edge_url, context, {"Authorization": f"Bearer {token}"})
