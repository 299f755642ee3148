"""The principal of a verified token, and the verifiers of an issuer's tokens."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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
    """Entry point of the only job that the principal may run, from an intent; empty for an access token."""
    node_region: str = ""
    """Region of the other node that sent the request to the key broker; empty for this process's own region."""
    models: tuple[str, ...] | None = None
    """The only models that the token's scope allows; None if only the role decides."""


def principal_as_json(principal: Principal) -> dict[str, Any]:
    """Return a principal as an event has it."""
    return {
        "subject": principal.subject,
        "role": principal.role.value,
        "purpose": principal.purpose,
        "tenant": principal.tenant,
        "models": None if principal.models is None else sorted(principal.models),
    }


def principal_from_json(content: Mapping[str, Any]) -> Principal:
    """Return the principal that an event has."""
    models = content.get("models")
    return Principal(
        subject=str(content["subject"]),
        role=Role(content["role"]),
        purpose=str(content["purpose"]),
        tenant=str(content["tenant"]),
        models=None if models is None else tuple(models),
        expires_at=int(time.time()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimNames:
    """An issuer's names for the claims that Falaj reads."""

    role: str = "role"
    purpose: str = "purpose"
    tenant: str = "tenant"
    scope: str = "scope"


class Verifier:
    """Verifies the tokens of one issuer by one set of rules."""

    default_rules: ClassVar[TokenRules]
    """Rules for tokens of the development issuer."""

    def __init__(
        self,
        keys: KeySource,
        *,
        rules: TokenRules | None = None,
        names: ClaimNames | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self.rules = rules or self.default_rules
        self._names = names or ClaimNames()
        self._clock = clock

    @classmethod
    def of(cls, places: Layout) -> Self:
        """Return the verifier of the development issuer's tokens. It follows key rotations.

        Raises:
            ConfigError: there is no issuer yet.
        """
        return cls(local_keys(places))

    def now(self) -> float:
        """Return the current time of this verifier's clock in Unix seconds."""
        return self._clock()

    def claims(self, token: str) -> dict[str, Any]:
        """Return all claims of a valid token.

        Raises:
            Unauthenticated: signature, algorithm, type, key, issuer or audience is wrong; the token has expired or is
                not yet valid; or its expiry is missing or too far away.
        """
        return verified_claims(token, find=self._keys.find, rules=self.rules, now=self._clock())


class TokenVerifier(Verifier):
    """Verifies access tokens."""

    default_rules = TokenRules(issuer=ISSUER, audience=AUDIENCE)

    def verify(self, token: str) -> Principal:
        """Return the principal of a token.

        Raises:
            Unauthenticated: see `claims`; or the role does not exist.
        """
        return principal_of(self.claims(token), names=self._names)


def local_keys(places: Layout) -> FileKeys:
    """Return the keys of the development issuer.

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
    """Return the principal that verified claims name.

    Raises:
        Unauthenticated: the role does not exist, or a claim is not text.
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
    """Return the user that runs this process, as events name it."""
    return f"user:{getpass.getuser()}"
