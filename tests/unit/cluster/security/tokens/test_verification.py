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
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.principal import TokenVerifier, local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import LEEWAY_S, MAX_LIFETIME_S, MAX_TOKEN_BYTES, TokenRules
from cluster.storage import Layout

Sign = Callable[..., str]
NOW = int(time.time())  # time of collection; claims must stay valid for the whole test run
DAY = 86_400


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A storage root with a dev issuer."""
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
    """Sign arbitrary claims with the issuer's real key."""
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
    """Return a token with any text as header and claims, and a valid ES256 signature. joserfc would refuse to write
    it."""
    parts = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in (header, claims)]
    r, s = decode_dss_signature(
        key.private_key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr]
    )
    signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return ".".join([*parts, base64.urlsafe_b64encode(signature).decode().rstrip("=")])


def unsigned(*parts: str) -> str:
    """Return a token with these texts as header and claims, and an invalid signature."""
    return ".".join(
        [*(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts), "c2ln"]
    )


def encoded(value: dict[str, Any]) -> str:
    """Return a part of a JWT."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


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


def test_unchanged_signed_token_is_valid(sign: Sign, verifier: TokenVerifier) -> None:
    """The helper `sign` gives a valid token, so the refusals below have the tested reason."""
    assert verifier.verify(sign()).subject == "alice"


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"exp": value}
            for value in (NOW - 60, "never", str(NOW + DAY), True, None, [NOW + DAY], -1, -(10**400))
        ),
        *({"exp": value} for value in (10**400, 1e308, NOW + 366 * DAY, float("inf"), float("nan"))),
        *({"nbf": value} for value in (NOW + DAY, str(NOW - 5), False, float("nan"))),
        *({"iat": value} for value in (NOW + DAY, "yesterday")),
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
        *(
            {"role": value}
            for value in ("king", None, ["service"], ["service", "admin"], {"role": "admin"}, "Admin", "")
        ),
        *({"drop": name} for name in ("exp", "iss", "aud", "sub", "role")),
    ],
    ids=",".join,
)
def test_wrong_or_missing_claim_is_refused(
    sign: Sign, verifier: TokenVerifier, changes: dict[str, Any]
) -> None:
    """A wrong or missing claim is refused, although the signature is valid."""
    with pytest.raises(Unauthenticated):
        verifier.verify(sign(**changes))


def test_unsigned_token_is_refused(sign: Sign, verifier: TokenVerifier, kid: str) -> None:
    """`alg: none` is refused, with and without a signature."""
    _, claims, signature = sign().split(".")
    for name in ("none", "None", "NONE"):
        header = encoded({"alg": name, "kid": kid})
        for tail in ("", signature):
            with pytest.raises(Unauthenticated):
                verifier.verify(f"{header}.{claims}.{tail}")


def test_public_key_is_not_accepted_as_an_hmac_secret(
    sign: Sign, verifier: TokenVerifier, places: Layout, kid: str
) -> None:
    """An HS256 token keyed with the public key's PEM is refused (algorithm confusion)."""
    public = (Path(places.keys) / "issuer.pub.pem").read_bytes()
    message = f"{encoded({'alg': 'HS256', 'kid': kid})}.{sign().split('.')[1]}"
    digest = hmac.new(public, message.encode(), hashlib.sha256).digest()
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{message}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}")


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


NOT_TEXT_OF_THREE_PARTS = [None, b"a.b.c", 7, [], "é.é.é", "\ud800.a.b", "", ".", "..", "...", "a.b.c.d.e"]
WRONG_HEADERS = ["[]", "{}", '{"alg":1}', '{"alg":["ES256"]}', "null", "{"]


@pytest.mark.parametrize(
    "value",
    [
        *NOT_TEXT_OF_THREE_PARTS,
        unsigned("null", "null"),
        *(unsigned(header, "{}") for header in WRONG_HEADERS),
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
    claims = {"iss": "falaj-dev", "aud": "falaj", "sub": "alice", "role": "admin", "exp": NOW + DAY}
    with pytest.raises(Unauthenticated):
        verifier.verify(f"{header}.{encoded(claims)}.{signature}")


def test_oversized_token_is_refused_before_decoding(verifier: TokenVerifier) -> None:
    """The length is checked before the token is decoded."""
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
