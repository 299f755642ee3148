"""Refuse requests that do not come from the edge, on servers that other machines reach.

A client that reaches a replica's port over the network could pass by the edge's limits and access records. Serve's
servers do not enforce client certificates, so the edge's secret is required (see `edge_headers.py`). On loopback a
replica answers without it, but ignores the edge's headers.
"""

from __future__ import annotations

import hmac

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import AccessDenied
from cluster.host.this_node import this_node
from cluster.security.edge_proof import edge_proof
from cluster.storage import Layout
from serve_apps.replica.edge_headers import PROOF
from serve_apps.replica.http import refusal

HEALTH_PATH = "/-/healthz"
_PROOF = PROOF.encode()


def edge_only() -> list[Middleware]:
    """Return the middleware of a server on a cluster with several nodes; an empty list on one with one node.

    Raises:
        ConfigError: other users can read the secret's file.
    """
    node = this_node()
    if node is None:
        return []
    return [Middleware(EdgeOnly, proof=edge_proof(Layout(node.storage_root, node.local_root)))]


class EdgeOnly:
    """Middleware that answers 403 to a request without the edge's secret; health checks need none.

    Args:
        app: the next application.
        proof: the installation's secret.
    """

    def __init__(self, app: ASGIApp, proof: str) -> None:
        self._app = app
        self._proof = proof.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI request."""
        if scope["path"] != HEALTH_PATH and not self._has_proof(scope):
            denied = AccessDenied("This server answers its edge only. Send the request to the edge.")
            await refusal(denied)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_proof(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope["headers"] if name == _PROOF), b"")
        return hmac.compare_digest(sent, self._proof)
