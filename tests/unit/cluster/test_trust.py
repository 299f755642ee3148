"""Whose tokens are believed where an OIDC issuer is configured: a real HTTP server that publishes its keys."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from joserfc.jwk import RSAKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.intent import INTENT_AUDIENCE, MAX_TTL_S, mint_intent
from cluster.security.tokens.issuer import ISSUER, ensure_issuer, mint_token
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.settings import IssuerConfig
from cluster.storage import Layout
from tests.oidc_issuer import Issuer, new_key


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.close()


@pytest.fixture
def places(tmp_path: Path) -> Layout:
    """A storage root that has a dev issuer besides."""
    places = Layout(str(tmp_path))
    ensure_issuer(places)
    return places


def refused(trust: Trust, token: str) -> bool:
    try:
        trust.verify(token)
    except Unauthenticated:
        return True
    return False


def intent_of(issuer: Issuer, **changes: object) -> str:
    claims = {"aud": INTENT_AUDIENCE, "entrypoint": "jobs.train", "jti": uuid.uuid4().hex} | changes
    return issuer.token(**claims)


@pytest.mark.parametrize("by_discovery", [True, False])
def test_only_the_configured_issuer_is_believed(issuer: Issuer, places: Layout, by_discovery: bool) -> None:
    """Wherever its keys were found; the dev issuer's key file then opens nothing any more."""
    config = IssuerConfig(url=issuer.url, jwks_url=None if by_discovery else f"{issuer.url}/jwks")
    trust = Trust.of(config, places)
    assert trust.verify(issuer.token()).subject == "alice"
    dev = mint_token(places, subject="eve", role=Role.admin, purpose="")
    eve = Principal(subject="eve", role=Role.admin, purpose="", expires_at=int(time.time()) + 60)
    for token in (dev, mint_intent(places, eve, entrypoint="jobs.train"), issuer.token(new_key())):
        assert refused(trust, token)
    assert Trust.of(IssuerConfig(), places).verify(dev).subject == "eve"
    assert refused(Trust.of(IssuerConfig(), places), issuer.token())


def test_the_issuer_chooses_audience_and_the_names_of_its_claims(issuer: Issuer, places: Layout) -> None:
    """What stands under our own names then means nothing."""
    config = IssuerConfig(
        url=issuer.url, audience="api://falaj", role_claim="r", purpose_claim="p", tenant_claim="t"
    )
    trust = Trust.of(config, places)
    given = {"r": "auditor", "p": "audit", "t": "north", "role": "admin", "purpose": "x", "tenant": "south"}
    found = trust.verify(issuer.token(aud="api://falaj", **given))
    assert (found.role, found.purpose, found.tenant) == (Role.auditor, "audit", "north")
    assert refused(trust, issuer.token(aud="falaj", **given))
    assert refused(trust, issuer.token(aud="api://falaj", role="admin"))


def test_both_kinds_of_keys_and_a_rotation(issuer: Issuer, places: Layout) -> None:
    """A new key is found by the first token that names it, RS256 beside ES256."""
    (old,) = issuer.keys
    trust = Trust.of(IssuerConfig(url=issuer.url), places)
    trust.keys._cooldown_s = 0.0  # type: ignore[attr-defined]
    assert trust.verify(issuer.token()).subject == "alice"
    rsa = RSAKey.generate_key(2048, {"use": "sig"}, auto_kid=True)
    issuer.keys = [rsa]
    assert trust.verify(issuer.token(rsa)).subject == "alice"
    assert refused(trust, issuer.token(old))


def test_an_intent_runs_a_job_and_is_no_access_token(issuer: Issuer, places: Layout) -> None:
    """The audience keeps the two apart, where the issuer cannot set the type; neither stands in for the other."""
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
def test_an_issuer_whose_keys_could_be_another_s_is_refused(places: Layout, url: str) -> None:
    """At once, when a process starts, and not with its first token."""
    with pytest.raises(ConfigError):
        Trust.of(IssuerConfig(url=url), places)
    with pytest.raises(ConfigError):
        Trust.of(IssuerConfig(url="https://issuer.example", jwks_url=url), places)
