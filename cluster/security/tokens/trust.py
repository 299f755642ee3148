"""The trusted issuer of an installation: the configured OIDC issuer, or else the development issuer.

In production the OIDC issuer signs access tokens (audience `identity.issuer.audience`) for people and services, and
intents (audience `falaj-intent`, with the claim `entrypoint`) for jobs. Both use ES256 or RS256 and keys of the
issuer's JWK set.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.security.tokens.intent import INTENT_AUDIENCE, INTENT_TYPE, MAX_TTL_S, IntentVerifier, is_intent
from cluster.security.tokens.issuer import ISSUER
from cluster.security.tokens.oidc import MAX_AGE_S, KeySource, RemoteKeys, discovery_fetcher, jwks_fetcher
from cluster.security.tokens.principal import ClaimNames, Principal, TokenVerifier, local_keys
from cluster.security.tokens.verification import ACCESS_TYPES, KEY_TYPES, TokenRules
from cluster.settings import IssuerConfig
from cluster.storage import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """The verifiers of the trusted issuer."""

    keys: KeySource
    tokens: TokenVerifier
    intents: IntentVerifier

    @classmethod
    def of(cls, issuer: IssuerConfig, places: Layout, *, keys_max_age_s: float = MAX_AGE_S) -> Trust:
        """Return the verifiers of the configured issuer.

        Args:
            issuer: the configured issuer.
            places: paths below the storage root, for the development issuer.
            keys_max_age_s: seconds after which an OIDC issuer's keys are fetched again.

        Raises:
            ConfigError: the address is neither https nor loopback; or no issuer is configured and the development
                issuer does not exist.
        """
        if issuer.url is None:
            keys: KeySource = local_keys(places)
            return cls(keys=keys, tokens=TokenVerifier(keys), intents=IntentVerifier(keys))
        if issuer.url == ISSUER:
            raise ConfigError(
                f"identity.issuer.url={ISSUER} is the development issuer's name. Set it to null to use this issuer."
            )
        fetch = (
            jwks_fetcher(issuer.jwks_url, ca_file=issuer.ca_file)
            if issuer.jwks_url
            else discovery_fetcher(issuer.url, ca_file=issuer.ca_file)
        )
        keys = RemoteKeys(fetch, algorithms=tuple(KEY_TYPES), max_age_s=keys_max_age_s)
        names = ClaimNames(
            role=issuer.role_claim,
            purpose=issuer.purpose_claim,
            tenant=issuer.tenant_claim,
            scope=issuer.scope_claim,
        )
        return cls(
            keys=keys,
            tokens=TokenVerifier(keys, rules=access_rules(issuer), names=names),
            intents=IntentVerifier(
                keys,
                rules=TokenRules(
                    issuer=issuer.url,
                    audience=INTENT_AUDIENCE,
                    algorithms=tuple(KEY_TYPES),
                    types=ACCESS_TYPES | {INTENT_TYPE},
                    max_lifetime_s=MAX_TTL_S,
                ),
                names=names,
            ),
        )

    def verify(self, token: str) -> Principal:
        """Return the principal of an access token (of a person or replica) or of an intent (of a job).

        Raises:
            Unauthenticated: the token is not valid.
        """
        return self.intents.verify(token).principal if is_intent(token) else self.tokens.verify(token)


def access_rules(issuer: IssuerConfig) -> TokenRules:
    """Return the rules for access tokens of an issuer."""
    if issuer.url is None:
        return TokenVerifier.default_rules
    return TokenRules(issuer=issuer.url, audience=issuer.audience, algorithms=tuple(KEY_TYPES))
