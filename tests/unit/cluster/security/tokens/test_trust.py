"""The trusted issuer if an OIDC issuer is configured, with a real HTTP server that publishes its keys."""

from __future__ import annotations

import time
import uuid

import pytest
from joserfc.jwk import RSAKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.intent import INTENT_AUDIENCE, MAX_TTL_S, mint_intent
from cluster.security.tokens.issuer import ISSUER, mint_token
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.settings import IssuerConfig
from cluster.storage import Layout
from tests.servers.oidc_issuer import Issuer, new_key, refused


def intent_of(issuer: Issuer, **changes: object) -> str:
    claims = {"aud": INTENT_AUDIENCE, "entrypoint": "jobs.train", "jti": uuid.uuid4().hex} | changes
    return issuer.token(**claims)


@pytest.mark.parametrize("by_discovery", [True, False])
def test_only_the_configured_issuer_is_trusted(issuer: Issuer, places: Layout, by_discovery: bool) -> None:
    """Independent of how its keys are found. Tokens of the development issuer are then refused."""
    config = IssuerConfig(url=issuer.url, jwks_url=None if by_discovery else f"{issuer.url}/jwks")
    trust = Trust.of(config, places)
    assert trust.verify(issuer.token()).subject == "alice"
    dev = mint_token(places, subject="eve", role=Role.admin, purpose="")
    eve = Principal(subject="eve", role=Role.admin, purpose="", expires_at=int(time.time()) + 60)
    for token in (dev, mint_intent(places, eve, entrypoint="jobs.train"), issuer.token(new_key())):
        assert refused(trust, token)
    assert Trust.of(IssuerConfig(), places).verify(dev).subject == "eve"
    assert refused(Trust.of(IssuerConfig(), places), issuer.token())


def test_audience_and_claim_names_are_configurable(issuer: Issuer, places: Layout) -> None:
    """Our default claim names then have no effect."""
    config = IssuerConfig(
        url=issuer.url, audience="api://falaj", role_claim="r", purpose_claim="p", tenant_claim="t"
    )
    trust = Trust.of(config, places)
    claims = {"r": "auditor", "p": "audit", "t": "north", "role": "admin", "purpose": "x", "tenant": "south"}
    principal = trust.verify(issuer.token(aud="api://falaj", **claims))
    assert (principal.role, principal.purpose, principal.tenant) == (Role.auditor, "audit", "north")
    assert refused(trust, issuer.token(aud="falaj", **claims))
    assert refused(trust, issuer.token(aud="api://falaj", role="admin"))


def test_rotation_from_es256_to_rs256_is_followed(issuer: Issuer, places: Layout) -> None:
    """The first token with the new `kid` triggers the fetch."""
    (old,) = issuer.keys
    trust = Trust.of(IssuerConfig(url=issuer.url), places)
    trust.keys._cooldown_s = 0.0  # type: ignore[attr-defined]
    assert trust.verify(issuer.token()).subject == "alice"
    rsa = RSAKey.generate_key(2048, {"use": "sig"}, auto_kid=True)
    issuer.keys = [rsa]
    assert trust.verify(issuer.token(rsa)).subject == "alice"
    assert refused(trust, issuer.token(old))


def test_intent_and_access_token_differ_by_audience(issuer: Issuer, places: Layout) -> None:
    """An issuer may be unable to set the type, so the audience separates them."""
    trust = Trust.of(IssuerConfig(url=issuer.url), places)
    assert trust.verify(intent_of(issuer)).entrypoint == "jobs.train"
    assert trust.intents.verify(intent_of(issuer), entrypoint="jobs.train").principal.subject == "alice"
    with pytest.raises(Unauthenticated):
        trust.tokens.verify(intent_of(issuer))
    with pytest.raises(Unauthenticated):
        trust.intents.verify(issuer.token(entrypoint="jobs.train", jti="1"))
    with pytest.raises(Unauthenticated, match=r"not for 'jobs\.sweep'"):
        trust.intents.verify(intent_of(issuer), entrypoint="jobs.sweep")
    assert refused(trust, intent_of(issuer, exp=int(time.time()) + MAX_TTL_S + 600))
    assert refused(trust, intent_of(issuer, entrypoint="../../evil"))


@pytest.mark.parametrize(
    "url", [ISSUER, "http://issuer.example", "ftp://127.0.0.1", "https://user:pw@issuer"]
)
def test_unsafe_issuer_address_is_refused(places: Layout, url: str) -> None:
    """When the process starts, not with the first token."""
    with pytest.raises(ConfigError):
        Trust.of(IssuerConfig(url=url), places)
    with pytest.raises(ConfigError):
        Trust.of(IssuerConfig(url="https://issuer.example", jwks_url=url), places)
