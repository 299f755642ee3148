"""Whose tokens this installation believes: an OIDC issuer's where one is configured, else the dev issuer's.

In production the issuer signs access tokens (audience `identity.issuer.audience`) for people and services, and intents
(audience `falaj-intent`, with the claim `entrypoint`) for jobs. Both with ES256 or RS256, by keys of its JWK set.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.security.tokens.intent import INTENT_AUDIENCE, INTENT_TYPE, MAX_TTL_S, IntentVerifier, is_intent
from cluster.security.tokens.issuer import AUDIENCE, ISSUER
from cluster.security.tokens.oidc import MAX_AGE_S, KeySource, RemoteKeys, discovered, jwks_at
from cluster.security.tokens.principal import ClaimNames, Principal, TokenVerifier, local_keys
from cluster.security.tokens.verification import ACCESS_TYPES, KEY_TYPES, TokenRules
from cluster.settings import IssuerConfig
from cluster.storage import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """The verifiers of the issuer that is believed here."""

    keys: KeySource
    tokens: TokenVerifier
    intents: IntentVerifier

    @classmethod
    def of(cls, issuer: IssuerConfig, places: Layout, *, keys_max_age_s: float = MAX_AGE_S) -> Trust:
        """As configured.

        Args:
            issuer: whom to believe.
            places: the dev issuer's.
            keys_max_age_s: how old an OIDC issuer's keys may be before they are fetched anew.

        Raises:
            ConfigError: an address that is neither https nor loopback; or no dev issuer yet, where none is configured.
        """
        if issuer.url is None:
            keys: KeySource = local_keys(places)
            return cls(keys=keys, tokens=TokenVerifier(keys), intents=IntentVerifier(keys))
        if issuer.url == ISSUER:
            raise ConfigError(
                f"identity.issuer.url={ISSUER} is the dev issuer's name. Leave it null for that one."
            )
        fetch = (
            jwks_at(issuer.jwks_url, ca_file=issuer.ca_file)
            if issuer.jwks_url
            else discovered(issuer.url, ca_file=issuer.ca_file)
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
        """The principal of an access token (a person's, a replica's) or of an intent (a job's), each by its own rules.

        Raises:
            Unauthenticated: it does not hold.
        """
        return self.intents.verify(token).principal if is_intent(token) else self.tokens.verify(token)


def access_rules(issuer: IssuerConfig) -> TokenRules:
    """What an access token must say here."""
    if issuer.url is None:
        return TokenRules(issuer=ISSUER, audience=AUDIENCE)
    return TokenRules(issuer=issuer.url, audience=issuer.audience, algorithms=tuple(KEY_TYPES))
