"""Tokens: what is minted passes, everything else is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.identity import MAX_TOKEN_BYTES, TokenVerifier, ensure_issuer, mint_token
from cluster.security.policy import Role
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

    def signed(*, drop: str | None = None, **changes: Any) -> str:
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
        return jwt.encode({"alg": "ES256", "kid": kid}, claims, key)

    return signed


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
        {"exp": NOW - 1},
        {"exp": "never"},
        {"exp": True},
        {"nbf": NOW + DAY},
        {"iss": "somebody"},
        {"aud": "another"},
        {"aud": ["another"]},
        {"sub": ""},
        {"role": "king"},
        {"role": None},
        {"role": ["service"]},
    ],
    ids=str,
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
    token = sign(exp=NOW - 1)
    with pytest.raises(Unauthenticated) as refused:
        verifier.verify(token)
    assert not any(part in str(refused.value) for part in token.split("."))


def test_the_issuer_is_made_once_and_kept(places: Layout, sign: Sign, verifier: TokenVerifier) -> None:
    """A second start keeps the keys; the private one is for its owner only."""
    files = {path.name: path.read_bytes() for path in Path(places.keys).iterdir()}
    ensure_issuer(places)
    assert {path.name: path.read_bytes() for path in Path(places.keys).iterdir()} == files
    assert (Path(places.keys) / "issuer.pem").stat().st_mode & 0o777 == 0o600
    assert "d" not in json.loads(files["jwks.json"])["keys"][0]


def test_the_kid_is_the_keys_thumbprint(places: Layout, kid: str) -> None:
    """RFC 7638, so that a new key gets a new name by itself."""
    key = ECKey.import_key((Path(places.keys) / "issuer.pub.pem").read_bytes())
    required = {name: key.as_dict(private=False)[name] for name in ("crv", "kty", "x", "y")}
    digest = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode()).digest()
    assert kid == base64.urlsafe_b64encode(digest).decode().rstrip("=")


def test_without_an_issuer_it_is_said_how_to_get_one(tmp_path: Path) -> None:
    """Minting never makes keys by itself."""
    places = Layout(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cluster\.up"):
        mint_token(places, subject="a", role=Role.service, purpose="")
    with pytest.raises(ConfigError, match=r"cluster\.up"):
        TokenVerifier.of(places)
    assert list(tmp_path.iterdir()) == []


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command-line tool."""
    command = [sys.executable, "-m", "cluster.security.identity", "token", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_prints_a_token_and_nothing_else(
    places: Layout, verifier: TokenVerifier, tmp_path: Path
) -> None:
    """To standard output, or to a file that only its owner reads, even where one lay open before."""
    flags = (
        "--root",
        places.root,
        "--sub",
        "alice",
        "--role",
        "auditor",
        "--purpose",
        "audit",
        "--ttl-s",
        "60",
    )
    printed = run(*flags)
    assert printed.stdout.count("\n") == 1
    assert verifier.verify(printed.stdout.strip()).role is Role.auditor
    output = tmp_path / "token"
    output.write_text("old")
    output.chmod(0o644)
    written = run(*flags, "--output", str(output))
    assert written.stdout == written.stderr == ""
    assert verifier.verify(output.read_text().strip()).subject == "alice"
    assert output.stat().st_mode & 0o777 == 0o600


def test_the_tool_refuses_with_2_what_it_cannot_do(tmp_path: Path) -> None:
    """No issuer yet, or a role that does not exist."""
    missing = run("--root", str(tmp_path), "--sub", "a", "--role", "service")
    assert missing.returncode == 2
    assert missing.stderr.startswith("refused: ")
    assert run("--root", str(tmp_path), "--sub", "a", "--role", "king").returncode == 2
