"""Tokens: what is minted passes, everything else is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from cluster.errors import Unauthenticated
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.principal import TokenVerifier, local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import LEEWAY_S, MAX_LIFETIME_S, MAX_TOKEN_BYTES, TokenRules
from cluster.storage import Layout

Sign = Callable[..., str]
NOW = int(time.time())  # when the tests were collected: a claim must hold for the whole run after it
DAY = 86_400


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A storage root with an issuer."""
    places = Layout(str(tmp_path_factory.mktemp("root")))
    ensure_issuer(places)
    return places


@pytest.fixture(scope="module")
def verifier(places: Layout) -> TokenVerifier:
    return TokenVerifier.of(places)


@pytest.fixture(scope="module")
def kid(places: Layout) -> str:
    jwks = json.loads((Path(places.keys) / "jwks.json").read_text())
    return str(jwks["keys"][0]["kid"])


@pytest.fixture(scope="module")
def sign(places: Layout, kid: str) -> Sign:
    """Sign claims of our own with the issuer's real key."""
    key = ECKey.import_key((Path(places.keys) / "issuer.pem").read_bytes())

    def signed(*, drop: str | None = None, header: dict[str, Any] | None = None, **changes: Any) -> str:
        claims: dict[str, Any] = {
            "iss": "falaj-dev",
            "aud": "falaj",
            "sub": "alice",
            "role": "service",
            "purpose": "testing",
            "nbf": NOW - 5,
            "exp": NOW + DAY,
        }
        claims |= changes
        claims.pop(drop, None)
        protected = {"alg": "ES256", "kid": kid, "typ": "JWT"} | (header or {})
        return sealed(key, json.dumps(protected), json.dumps(claims))

    return signed


def sealed(key: ECKey, header: str, claims: str) -> str:
    """A token of any text that joserfc would not write, with a true ES256 signature."""
    parts = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in (header, claims)]
    r, s = decode_dss_signature(
        key.private_key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr]
    )
    signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return ".".join([*parts, base64.urlsafe_b64encode(signature).decode().rstrip("=")])


def encoded(value: dict[str, Any]) -> str:
    """A JWT part."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize("role", list(Role))
def test_a_minted_token_is_verified(places: Layout, verifier: TokenVerifier, role: Role) -> None:
    """For every role."""
    principal = verifier.verify(mint_token(places, subject="alice", role=role, purpose="credit", ttl_s=60))
    assert (principal.subject, principal.role, principal.purpose) == ("alice", role, "credit")
    assert 50 < principal.expires_at - time.time() <= 60


def test_the_claims_of_a_minted_token_suit_the_edge(places: Layout, kid: str) -> None:
    """HAProxy reads an array `aud` as empty, so it is a string; `kid` names the key; expiry is stated."""
    token = mint_token(places, subject="alice", role=Role.service, purpose="credit")
    header, claims = (
        json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in token.split(".")[:2]
    )
    assert header == {"alg": "ES256", "kid": kid, "typ": "JWT"}
    assert claims["aud"] == "falaj"
    assert claims["exp"] - claims["iat"] == 900


def test_a_token_signed_here_passes_unchanged(sign: Sign, verifier: TokenVerifier) -> None:
    """So that the refusals below are for the reason they say."""
    assert verifier.verify(sign()).subject == "alice"


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW - 60},
        {"exp": "never"},
        {"exp": str(NOW + DAY)},
        {"exp": True},
        {"exp": None},
        {"exp": [NOW + DAY]},
        {"exp": -1},
        {"exp": -(10**400)},
        {"exp": 10**400},
        {"exp": 1e308},
        {"exp": NOW + 366 * DAY},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"nbf": NOW + DAY},
        {"nbf": str(NOW - 5)},
        {"nbf": False},
        {"nbf": float("nan")},
        {"iat": NOW + DAY},
        {"iat": "yesterday"},
        {"jti": 7},
        {"iss": "somebody"},
        {"aud": "another"},
        {"aud": ["another"]},
        {"aud": []},
        {"aud": ["falaj", 1]},
        {"aud": {"falaj": True}},
        {"iss": ["falaj-dev"]},
        {"sub": ""},
        {"sub": 7},
        {"sub": ["alice"]},
        {"sub": "a" * 300},
        {"sub": "alice\nrefused: bob"},
        {"sub": "\u202eecila"},
        {"purpose": None},
        {"purpose": ["credit"]},
        {"tenant": None},
        {"tenant": {"default": 1}},
        {"role": "king"},
        {"role": None},
        {"role": ["service"]},
        {"role": ["service", "admin"]},
        {"role": {"role": "admin"}},
        {"role": "Admin"},
        {"role": ""},
    ],
    ids=",".join,
)
def test_a_wrong_claim_is_refused(sign: Sign, verifier: TokenVerifier, changes: dict[str, Any]) -> None:
    """Though the signature is right."""
    with pytest.raises(Unauthenticated):
        verifier.verify(sign(**changes))


@pytest.mark.parametrize("missing", ["exp", "iss", "aud", "sub", "role"])
def test_a_missing_claim_is_refused(sign: Sign, verifier: TokenVerifier, missing: str) -> None:
    """Above all the expiry."""
    with pytest.raises(Unauthenticated):
        verifier.verify(sign(drop=missing))


def test_an_unsigned_token_is_refused(sign: Sign, verifier: TokenVerifier, kid: str) -> None:
    """`alg: none`, with and without a signature's remains."""
    _, claims, signature = sign().split(".")
    for name in ("none", "None", "NONE"):
        header = encoded({"alg": name, "kid": kid})
        for tail in ("", signature):
            with pytest.raises(Unauthenticated):
                verifier.verify(f"{header}.{claims}.{tail}")


def test_the_public_key_is_no_hmac_secret(
    sign: Sign, verifier: TokenVerifier, places: Layout, kid: str
) -> None:
    """HS256 keyed with the public key's PEM, the classic confusion."""
    public = (Path(places.keys) / "issuer.pub.pem").read_bytes()
    message = f"{encoded({'alg': 'HS256', 'kid': kid})}.{sign().split('.')[1]}"
    digest = hmac.new(public, message.encode(), hashlib.sha256).digest()
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{message}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}")


def test_a_key_that_the_token_brings_along_is_not_used(verifier: TokenVerifier, kid: str) -> None:
    """Neither a foreign key under our kid nor one in the header, nor another algorithm."""
    claims = {"iss": "falaj-dev", "aud": "falaj", "sub": "eve", "role": "admin", "exp": NOW + DAY}
    own, rsa = ECKey.generate_key("P-256"), RSAKey.generate_key(2048)
    forged = [
        jwt.encode({"alg": "ES256", "kid": kid}, claims, own),
        jwt.encode({"alg": "ES256", "kid": kid, "jwk": own.as_dict(private=False)}, claims, own),
        jwt.encode({"alg": "ES256", "kid": own.thumbprint()}, claims, own),
        jwt.encode({"alg": "RS256", "kid": kid}, claims, rsa),
    ]
    for token in forged:
        with pytest.raises(Unauthenticated):
            verifier.verify(token)


@pytest.mark.parametrize(
    "header",
    [
        {"kid": "../../../../dev/null"},
        {"kid": ".."},
        {"kid": "x' UNION SELECT 'secret"},
        {"kid": "/etc/passwd"},
        {"kid": "file:///dev/null"},
        {"kid": ""},
        {"kid": "a" * 300},
        {"kid": "\u0000"},
        {"kid": None},
        {"kid": 7},
        {"kid": ["k"]},
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/chain.pem"},
        {"x5c": ["MIIB"]},
        {"jwk": {"kty": "EC"}},
        {"crit": ["exp"], "exp": NOW + DAY},
        {"crit": ["falaj"], "falaj": "x"},
        {"crit": []},
        {"crit": "b64"},
        {"b64": False, "crit": ["b64"]},
        {"zip": "DEF"},
        {"enc": "A256GCM"},
        {"cty": "JWT"},
        {"typ": "falaj-intent+jwt"},
        {"typ": "dpop+jwt"},
        {"typ": 7},
        {"alg": "none"},
        {"alg": "nOnE"},
        {"alg": "es256"},
        {"alg": "ES384"},
        {"alg": "HS256"},
        {"alg": "RS256"},
        {"alg": ["ES256"]},
        {"alg": None},
        {"extra": "a" * 600},
    ],
    ids=",".join,
)
def test_a_header_of_another_form_is_refused(
    sign: Sign, verifier: TokenVerifier, header: dict[str, Any]
) -> None:
    """Though it is signed with the issuer's key: what a token says of its own key is not believed."""
    with pytest.raises(Unauthenticated):
        verifier.verify(sign(header=header))


def test_a_token_without_kid_is_refused(places: Layout, verifier: TokenVerifier) -> None:
    """Even where there is but one key."""
    key = ECKey.import_key((Path(places.keys) / "issuer.pem").read_bytes())
    claims = {"iss": "falaj-dev", "aud": "falaj", "sub": "a", "role": "service", "exp": NOW + DAY}
    with pytest.raises(Unauthenticated, match="key"):
        verifier.verify(jwt.encode({"alg": "ES256"}, claims, key))


@pytest.mark.parametrize(
    "tail",
    [
        '"role": "service", "role": "admin"',
        '"role": "service", "nested": {"a": 1, "a": 2}',
        '"role": "service", "r\\u006fle": "admin"',
        '"role": "service", "big": ' + "9" * 5000,
        '"role": "service", "deep": ' + "[" * 1400 + "]" * 1400,
        '"role": "service", "x": NaN',
        '"role": "service", "x": "\\ud800", "purpose": "\\ud800"',
        '"role": "service",',
    ],
    ids=["twice", "twice below", "twice, escaped", "long number", "deep", "NaN", "surrogate", "comma"],
)
def test_json_that_two_readers_could_understand_differently_is_refused(
    places: Layout, kid: str, tail: str
) -> None:
    """Though its signature is right, and it may be long."""
    key = ECKey.import_key((Path(places.keys) / "issuer.pem").read_bytes())
    rules = TokenRules(issuer="falaj-dev", audience="falaj", max_bytes=100_000)
    patient = TokenVerifier(local_keys(places), rules=rules)
    header = json.dumps({"alg": "ES256", "kid": kid})
    head = f'{{"iss": "falaj-dev", "aud": "falaj", "sub": "a", "exp": {NOW + DAY}, '
    assert patient.verify(sealed(key, header, head + '"role": "service"}')).subject == "a"
    with pytest.raises(Unauthenticated):
        patient.verify(sealed(key, header, f"{head}{tail}}}"))
    twice = f'{{"alg": "ES256", "alg": "ES256", "kid": "{kid}"}}'
    with pytest.raises(Unauthenticated):
        patient.verify(sealed(key, twice, head + '"role": "service"}'))


@pytest.mark.parametrize(
    "value", [None, b"a.b.c", 7, [], "é.é.é", "\ud800.a.b", "", ".", "..", "...", "a.b.c.d.e"]
)
def test_what_is_no_token_is_refused_and_never_a_failure(verifier: TokenVerifier, value: Any) -> None:
    """Of whatever type."""
    with pytest.raises(Unauthenticated):
        verifier.verify(value)


def test_times_are_read_with_leeway(places: Layout, sign: Sign) -> None:
    """To the second, on both ends, because clocks differ."""
    at = NOW

    def says(now: float, **changes: Any) -> bool:
        try:
            TokenVerifier(local_keys(places), clock=lambda: now).verify(sign(**changes))
        except Unauthenticated:
            return False
        return True

    assert says(at + LEEWAY_S - 1, exp=at)
    assert not says(at + LEEWAY_S, exp=at)
    for name in ("nbf", "iat"):
        assert says(at - LEEWAY_S, **{"nbf": at - 99, name: at})
        assert not says(at - LEEWAY_S - 1, **{"nbf": at - 99, name: at})
    assert says(at, exp=at + MAX_LIFETIME_S)
    assert not says(at, exp=at + MAX_LIFETIME_S + LEEWAY_S + 1)


def test_an_audience_may_be_one_of_several(sign: Sign, verifier: TokenVerifier) -> None:
    """As OIDC issuers write it."""
    assert verifier.verify(sign(aud=["other", "falaj"])).subject == "alice"


def test_the_tenant_is_taken_from_the_token(places: Layout, sign: Sign, verifier: TokenVerifier) -> None:
    """Default where it says none."""
    token = mint_token(places, subject="a", role=Role.service, purpose="", tenant="north")
    assert verifier.verify(token).tenant == "north"
    assert verifier.verify(sign()).tenant == "default"


@pytest.mark.parametrize(
    ("scope", "models"),
    [
        (None, None),
        ("", None),
        ("openid profile", None),
        ("openid model:b model:a model:b", ("a", "b")),
        (["openid", "model:a"], ("a",)),
        ("model:", ("",)),
        ("xmodel:a Model:a", None),
    ],
)
def test_the_models_of_a_scope_are_taken_from_the_token(
    sign: Sign, verifier: TokenVerifier, scope: Any, models: tuple[str, ...] | None
) -> None:
    """None where it names no model, so that the role alone decides."""
    assert verifier.verify(sign(scope=scope)).models == models


@pytest.mark.parametrize("scope", [7, {"model:a": True}, [["model:a"]], [1]])
def test_a_scope_of_another_form_is_refused(sign: Sign, verifier: TokenVerifier, scope: Any) -> None:
    """It might have been meant to narrow."""
    with pytest.raises(Unauthenticated, match="scope"):
        verifier.verify(sign(scope=scope))


def test_only_algorithms_of_public_keys_can_be_allowed() -> None:
    """Neither none nor a shared secret, by no configuration."""
    for names in (("none",), ("HS256",), ("ES256", "HS256"), ()):
        with pytest.raises(ValueError, match="algorithms"):
            TokenRules(issuer="i", audience="a", algorithms=names)


def test_changed_claims_break_the_signature(sign: Sign, verifier: TokenVerifier) -> None:
    """A higher role needs a new signature."""
    header, _, signature = sign().split(".")
    claims = {"iss": "falaj-dev", "aud": "falaj", "sub": "alice", "role": "admin", "exp": NOW + DAY}
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{header}.{encoded(claims)}.{signature}")


def test_a_giant_token_is_refused_unread(verifier: TokenVerifier) -> None:
    """Its length is looked at before anything is decoded."""
    with pytest.raises(Unauthenticated, match="longer"):
        verifier.verify("a" * (MAX_TOKEN_BYTES + 1))


@given(st.one_of(st.text(), st.from_regex(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*", fullmatch=True)))
def test_garbage_is_refused_and_never_a_failure(verifier: TokenVerifier, text: str) -> None:
    """Whatever arrives in the header gives Unauthenticated and no other error."""
    with pytest.raises(Unauthenticated):
        verifier.verify(text)


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        ("[]", "{}"),
        ("{}", "{}"),
        ('{"alg":1}', "{}"),
        ('{"alg":["ES256"]}', "{}"),
        ("null", "null"),
        ("{", "{}"),
    ],
)
def test_json_of_the_wrong_shape_is_refused_and_never_a_failure(
    verifier: TokenVerifier, header: str, claims: str
) -> None:
    """Headers that decode to something else than an object with a known algorithm."""
    parts = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in (header, claims)]
    with pytest.raises(Unauthenticated):
        verifier.verify(".".join([*parts, "c2ln"]))


def test_the_refusal_does_not_repeat_the_token(sign: Sign, verifier: TokenVerifier) -> None:
    """A token never reaches an error message, and so no log."""
    token = sign(exp=NOW - 60)
    with pytest.raises(Unauthenticated) as refused:
        verifier.verify(token)
    assert not any(part in str(refused.value) for part in token.split("."))
