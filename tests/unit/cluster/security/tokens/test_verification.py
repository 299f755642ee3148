"""Verification of access tokens: minted tokens are valid, all others are refused."""

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
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.principal import TokenVerifier, local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import LEEWAY_S, MAX_LIFETIME_S, MAX_TOKEN_BYTES, TokenRules
from cluster.storage import Layout

Sign = Callable[..., str]
NOW = int(time.time())  # time of collection; claims must stay valid for the whole test run
DAY = 86_400


@pytest.fixture(scope="module")
def sign(places: Layout, kid: str) -> Sign:
    """Sign arbitrary claims with the issuer's real key."""
    key = ECKey.import_key((Path(places.keys) / "issuer.pem").read_bytes())

    def signed(*, drop: str | None = None, header: dict[str, Any] | None = None, **changes: Any) -> str:
        claims: dict[str, Any] = {"iss": "falaj-dev", "aud": "falaj", "sub": "alice", "role": "service"}
        claims |= {"purpose": "testing", "nbf": NOW - 5, "exp": NOW + DAY} | changes
        claims.pop(drop, None)
        protected = {"alg": "ES256", "kid": kid, "typ": "JWT"} | (header or {})
        return sealed(key, json.dumps(protected), json.dumps(claims))

    return signed


def encoded(part: bytes) -> str:
    """Return a part of a JWT."""
    return base64.urlsafe_b64encode(part).decode().rstrip("=")


def sealed(key: ECKey, header: str, claims: str) -> str:
    """Return a token with any text as header and claims, and a valid ES256 signature. joserfc refuses to write it."""
    parts = [encoded(header.encode()), encoded(claims.encode())]
    r, s = decode_dss_signature(
        key.private_key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr]
    )
    return ".".join([*parts, encoded(r.to_bytes(32, "big") + s.to_bytes(32, "big"))])


def unsigned(header: str, claims: str) -> str:
    """Return a token with any text as header and claims, and an invalid signature."""
    return f"{encoded(header.encode())}.{encoded(claims.encode())}.c2ln"


def in_json(**value: Any) -> str:
    """Return a part of a JWT with these fields."""
    return encoded(json.dumps(value).encode())


@pytest.mark.parametrize("role", list(Role))
def test_minted_token_is_valid(places: Layout, verifier: TokenVerifier, role: Role) -> None:
    """A minted token gives its principal, for every role."""
    principal = verifier.verify(mint_token(places, subject="alice", role=role, purpose="credit", ttl_s=60))
    assert (principal.subject, principal.role, principal.purpose) == ("alice", role, "credit")
    assert 50 < principal.expires_at - time.time() <= 60


def test_minted_token_has_the_claims_that_the_edge_reads(places: Layout, kid: str) -> None:
    """`aud` is a string, because HAProxy reads an array as empty. `kid` names the key, and the expiry is set."""
    token = mint_token(places, subject="alice", role=Role.service, purpose="credit")
    header, claims = (
        json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in token.split(".")[:2]
    )
    assert header == {"alg": "ES256", "kid": kid, "typ": "JWT"}
    assert claims["aud"] == "falaj"
    assert claims["exp"] - claims["iat"] == 900


@pytest.mark.parametrize(
    "changes",
    [
        *({"exp": value} for value in (NOW - 60, "never", str(NOW + DAY), True, None, [NOW + DAY])),
        *({"exp": value} for value in (-1, -(10**400))),
        *({"exp": value} for value in (10**400, 1e308, NOW + 366 * DAY, float("inf"), float("nan"))),
        *({"nbf": value} for value in (NOW + DAY, str(NOW - 5), False, float("nan"))),
        *({"iat": value} for value in (NOW + DAY, "yesterday")),
        {"jti": 7},
        *({"iss": value} for value in ("somebody", ["falaj-dev"])),
        *({"aud": value} for value in ("another", ["another"], [], ["falaj", 1], {"falaj": True})),
        *({"sub": value} for value in ("", 7, ["alice"], "a" * 300, "alice\nrefused: bob", "\u202eecila")),
        *({"purpose": value} for value in (None, ["credit"])),
        *({"tenant": value} for value in (None, {"default": 1})),
        *({"role": value} for value in ("king", "Admin", "", None, ["service"], ["service", "admin"])),
        {"role": {"role": "admin"}},
        *({"drop": name} for name in ("exp", "iss", "aud", "sub", "role")),
    ],
    ids=",".join,
)
def test_wrong_or_missing_claim_is_refused(
    sign: Sign, verifier: TokenVerifier, changes: dict[str, Any]
) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(sign(**changes))


def test_unsigned_token_is_refused(sign: Sign, verifier: TokenVerifier, kid: str) -> None:
    """`alg: none` is refused, with and without a signature."""
    _, claims, signature = sign().split(".")
    for name in ("none", "None", "NONE"):
        header = in_json(alg=name, kid=kid)
        for tail in ("", signature):
            with pytest.raises(Unauthenticated):
                verifier.verify(f"{header}.{claims}.{tail}")


def test_public_key_is_not_accepted_as_an_hmac_secret(
    sign: Sign, verifier: TokenVerifier, places: Layout, kid: str
) -> None:
    """An HS256 token keyed with the public key's PEM is refused (algorithm confusion)."""
    public = (Path(places.keys) / "issuer.pub.pem").read_bytes()
    message = f"{in_json(alg='HS256', kid=kid)}.{sign().split('.')[1]}"
    digest = hmac.new(public, message.encode(), hashlib.sha256).digest()
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{message}.{encoded(digest)}")


def test_key_in_the_token_is_not_used(verifier: TokenVerifier, kid: str) -> None:
    """A foreign key under our kid, a key in the header and another algorithm are refused."""
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
        *({"kid": value} for value in ("../../../../dev/null", "..", "/etc/passwd", "file:///dev/null")),
        *({"kid": value} for value in ("x' UNION SELECT 'secret", "", "a" * 300, "\u0000", None, 7, ["k"])),
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/chain.pem"},
        {"x5c": ["MIIB"]},
        {"jwk": {"kty": "EC"}},
        *({"crit": ["exp"], "exp": NOW + DAY}, {"crit": ["falaj"], "falaj": "x"}, {"crit": []}),
        *({"crit": "b64"}, {"b64": False, "crit": ["b64"]}),
        *({"zip": "DEF"}, {"enc": "A256GCM"}, {"cty": "JWT"}),
        *({"typ": value} for value in ("falaj-intent+jwt", "dpop+jwt", 7)),
        *({"alg": value} for value in ("none", "nOnE", "es256", "ES384", "HS256", "RS256", ["ES256"], None)),
        {"extra": "a" * 600},
    ],
    ids=",".join,
)
def test_unexpected_header_is_refused(sign: Sign, verifier: TokenVerifier, header: dict[str, Any]) -> None:
    """Headers of other forms are refused, although the issuer's key signed them."""
    with pytest.raises(Unauthenticated):
        verifier.verify(sign(header=header))


def test_token_without_kid_is_refused(places: Layout, verifier: TokenVerifier) -> None:
    """A `kid` is required, also if the issuer has only one key."""
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
def test_ambiguous_json_is_refused(places: Layout, kid: str, tail: str) -> None:
    """JSON that two parsers could read differently is refused, although its signature is valid."""
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
    "value",
    [
        *(None, b"a.b.c", 7, [], "é.é.é", "\ud800.a.b", "", ".", "..", "...", "a.b.c.d.e"),
        unsigned("null", "null"),
        *(unsigned(header, "{}") for header in ("[]", "{}", '{"alg":1}', '{"alg":["ES256"]}', "null", "{")),
    ],
)
def test_malformed_token_is_unauthenticated(verifier: TokenVerifier, value: Any) -> None:
    """A value that is not a token raises Unauthenticated and no other error."""
    with pytest.raises(Unauthenticated):
        verifier.verify(value)


def test_times_are_checked_with_leeway(places: Layout, sign: Sign) -> None:
    """Expiry and start have a leeway, exact to the second, because clocks differ."""
    at = NOW

    def is_valid(now: float, **changes: Any) -> bool:
        try:
            TokenVerifier(local_keys(places), clock=lambda: now).verify(sign(**changes))
        except Unauthenticated:
            return False
        return True

    assert is_valid(at + LEEWAY_S - 1, exp=at)
    assert not is_valid(at + LEEWAY_S, exp=at)
    for name in ("nbf", "iat"):
        assert is_valid(at - LEEWAY_S, **{"nbf": at - 99, name: at})
        assert not is_valid(at - LEEWAY_S - 1, **{"nbf": at - 99, name: at})
    assert is_valid(at, exp=at + MAX_LIFETIME_S)
    assert not is_valid(at, exp=at + MAX_LIFETIME_S + LEEWAY_S + 1)


def test_audience_may_be_one_of_several(sign: Sign, verifier: TokenVerifier) -> None:
    """The audience may be in a list, as OIDC issuers write it."""
    assert verifier.verify(sign(aud=["other", "falaj"])).subject == "alice"


def test_tenant_comes_from_the_token(places: Layout, sign: Sign, verifier: TokenVerifier) -> None:
    """The tenant is "default" if the token names none."""
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
def test_models_come_from_the_scope(
    sign: Sign, verifier: TokenVerifier, scope: Any, models: tuple[str, ...] | None
) -> None:
    """The models are None if the scope names none; the role alone then decides."""
    assert verifier.verify(sign(scope=scope)).models == models


@pytest.mark.parametrize("scope", [7, {"model:a": True}, [["model:a"]], [1]])
def test_malformed_scope_is_refused(sign: Sign, verifier: TokenVerifier, scope: Any) -> None:
    """A malformed scope is refused, because it may have been meant to narrow the rights."""
    with pytest.raises(Unauthenticated, match="scope"):
        verifier.verify(sign(scope=scope))


def test_only_public_key_algorithms_can_be_configured() -> None:
    """`none` and algorithms with a shared secret cannot be configured."""
    for names in (("none",), ("HS256",), ("ES256", "HS256"), ()):
        with pytest.raises(ValueError, match="algorithms"):
            TokenRules(issuer="i", audience="a", algorithms=names)


def test_changed_claims_break_the_signature(sign: Sign, verifier: TokenVerifier) -> None:
    """A changed role needs a new signature."""
    header, _, signature = sign().split(".")
    claims = in_json(iss="falaj-dev", aud="falaj", sub="alice", role="admin", exp=NOW + DAY)
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{header}.{claims}.{signature}")


def test_oversized_token_is_refused_before_decoding(verifier: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated, match="longer"):
        verifier.verify("a" * (MAX_TOKEN_BYTES + 1))


@given(st.one_of(st.text(), st.from_regex(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*", fullmatch=True)))
def test_garbage_is_unauthenticated(verifier: TokenVerifier, text: str) -> None:
    """Any text in the header raises Unauthenticated and no other error."""
    with pytest.raises(Unauthenticated):
        verifier.verify(text)


def test_error_message_does_not_contain_the_token(sign: Sign, verifier: TokenVerifier) -> None:
    """A token never reaches an error message, and so no log."""
    token = sign(exp=NOW - 60)
    with pytest.raises(Unauthenticated) as refused:
        verifier.verify(token)
    assert not any(part in str(refused.value) for part in token.split("."))
