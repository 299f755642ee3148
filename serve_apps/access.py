"""The replica's own check of who asks: the edge checked already, but a replica's port could be reached another way."""

from __future__ import annotations

from cluster.errors import Unauthenticated
from cluster.security.identity import Principal, TokenVerifier
from cluster.security.policy import Action, Policy, Resource

MAX_CACHED = 10_000
MAX_CACHED_S = 60
"""So long at most a token is remembered: that of a key taken away does not live on here."""


class AccessCheck:
    """Verifies tokens, and remembers each for a while, because an ES256 signature costs more than a prediction."""

    def __init__(
        self, verifier: TokenVerifier, *, policy: Policy | None = None, resource: Resource | None = None
    ) -> None:
        self._verifier = verifier
        self._policy = policy or Policy.load()
        self._resource = resource or Resource(kind="path", name="*")
        self._known: dict[str, tuple[Principal, float]] = {}

    def __call__(self, authorization: str | None, action: Action) -> Principal:
        """The principal, if it may do the action.

        Raises:
            Unauthenticated, AccessDenied
        """
        if authorization is None or not authorization.lower().startswith("bearer "):
            raise Unauthenticated("Give a token: 'Authorization: Bearer ...'.")
        principal = self._principal(authorization[7:].strip())
        self._policy.check(principal, action, self._resource)
        return principal

    def _principal(self, token: str) -> Principal:
        now = self._verifier.now()
        principal, until = self._known.get(token, (None, 0.0))
        if principal is not None and now < until:
            return principal
        self._known.pop(token, None)
        principal = self._verifier.verify(token)
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        expires_at = principal.expires_at + self._verifier.rules.leeway_s
        self._known[token] = (principal, min(expires_at, now + MAX_CACHED_S))
        return principal
