"""Who acts: the principal that a verified token speaks of, and the verifier of an issuer's tokens."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import Unauthenticated
from cluster.security.tokens.issuer import AUDIENCE, ISSUER, JWKS_NAME, no_issuer
from cluster.security.tokens.oidc import FileKeys, KeySource
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import TokenRules, scoped_models, text_claim, verified_claims
from cluster.storage import Layout, local


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """A verified identity."""

    subject: str
    role: Role
    purpose: str
    expires_at: int
    """Unix seconds."""
    tenant: str = "default"
    entrypoint: str = ""
    """The one job that a principal taken from an intent may run; empty for an access token's."""
    models: tuple[str, ...] | None = None
    """The only models that its scope lets it do anything to; none where its role alone decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimNames:
    """What an issuer calls the claims that are ours."""

    role: str = "role"
    purpose: str = "purpose"
    tenant: str = "tenant"
    scope: str = "scope"


class TokenVerifier:
    """Verifies the tokens of one issuer for one audience."""

    def __init__(
        self,
        keys: KeySource,
        *,
        rules: TokenRules | None = None,
        names: ClaimNames | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self.rules = rules or TokenRules(issuer=ISSUER, audience=AUDIENCE)
        self._names = names or ClaimNames()
        self._clock = clock

    @classmethod
    def of(cls, places: Layout) -> TokenVerifier:
        """The verifier of the local issuer; it sees a rotation by itself.

        Raises:
            ConfigError: there is no issuer yet.
        """
        return cls(local_keys(places))

    def verify(self, token: str) -> Principal:
        """The principal of a token.

        Raises:
            Unauthenticated: a wrong signature, algorithm, type, key, issuer or audience, a token that has expired, is
                not yet valid, says no expiry or one too far away, or a role that does not exist.
        """
        return principal_of(self.claims(token), names=self._names)

    def now(self) -> float:
        """Unix seconds of the clock that this verifier goes by."""
        return self._clock()

    def claims(self, token: str) -> dict[str, Any]:
        """All claims of a token that holds now.

        Raises:
            Unauthenticated: as `verify`, but for the claims that are our own.
        """
        return verified_claims(token, find=self._keys.find, rules=self.rules, now=self._clock())


def local_keys(places: Layout) -> FileKeys:
    """The keys of the dev issuer.

    Raises:
        ConfigError: there is no issuer yet.
    """
    path = local(places.keys) / JWKS_NAME
    if not path.exists():
        raise no_issuer(path)
    return FileKeys(path)


def principal_of(
    claims: dict[str, Any], *, entrypoint: str = "", names: ClaimNames | None = None
) -> Principal:
    """The principal that verified claims speak of.

    Raises:
        Unauthenticated: a role that does not exist, or a claim that is no text.
    """
    names = names or ClaimNames()
    role = text_claim(claims, names.role)
    if role not in Role.__members__:
        raise Unauthenticated("The token's role does not exist.")
    return Principal(
        subject=text_claim(claims, "sub"),
        role=Role(role),
        purpose=text_claim(claims, names.purpose, default=""),
        expires_at=int(claims["exp"]),
        tenant=text_claim(claims, names.tenant, default="default"),
        entrypoint=entrypoint,
        models=scoped_models(claims, names.scope),
    )


def current_actor() -> str:
    """Who runs this process, as events name it."""
    return f"user:{getpass.getuser()}"
