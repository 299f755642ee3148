"""The replica's own check of who asks: the edge checked already, but a replica's port could be reached another way."""

from __future__ import annotations

import time

from cluster.errors import AccessDenied, Unauthenticated
from cluster.security.identity import Principal, TokenVerifier
from cluster.security.policy import Action, allowed

MAX_CACHED = 10_000


class AccessCheck:
    """Verifies tokens, and remembers each until it expires, because an ES256 signature costs more than a prediction."""

    def __init__(self, verifier: TokenVerifier) -> None:
        self._verifier = verifier
        self._known: dict[str, Principal] = {}

    def __call__(self, authorization: str | None, action: Action) -> Principal:
        """The principal, if it may do the action.

        Raises:
            Unauthenticated, AccessDenied
        """
        if authorization is None or not authorization.lower().startswith("bearer "):
            raise Unauthenticated("Give a token: 'Authorization: Bearer ...'.")
        principal = self._principal(authorization[7:].strip())
        if not allowed(principal.role, action):
            raise AccessDenied(f"Role {principal.role} may not {action.replace('_', ' ')}.")
        return principal

    def _principal(self, token: str) -> Principal:
        principal = self._known.get(token)
        if principal is None:
            principal = self._verifier.verify(token)
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            self._known[token] = principal
        elif principal.expires_at <= time.time():
            del self._known[token]
            raise Unauthenticated("The token has expired.")
        return principal
