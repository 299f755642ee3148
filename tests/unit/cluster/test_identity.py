"""Tokens: what the dev issuer mints is verified, and nothing else is."""

from __future__ import annotations

import base64
import hmac
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from cluster.errors import AccessDenied, ConfigError, Unauthenticated
from cluster.security.identity import AUDIENCE, ISSUER, TokenVerifier, ensure_issuer, mint_token
from cluster.security.policy import ALLOWED, Action, Role, allowed
from cluster.storage import Layout
from serve_apps.access import AccessCheck


@pytest.fixture
def places(tmp_path: Path) -> Layout:
    layout = Layout(str(tmp_path))
    ensure_issuer(layout)
    return layout


def mint(places: Layout, *, header: dict[str, Any] | None = None, key: Any = None, **changes: Any) -> str:
    """A token of the issuer's own key, with some claims changed or (None) left out."""
    kid = json.loads((Path(places.keys) / "jwks.json").read_text())["keys"][0]["kid"]
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "role": "service", "exp": now + 60} | changes
    signer = key or ECKey.import_key((Path(places.keys) / "issuer.pem").read_bytes())
    head = {"alg": "ES256", "kid": kid} | (header or {})
    kept = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(head, kept, signer, algorithms=[head["alg"]])


def unsigned(places: Layout, alg: str, secret: bytes | None = None) -> str:
    """A token whose header says `alg`, with no signature or an HMAC by `secret`."""
    head = base64.urlsafe_b64encode(json.dumps({"alg": alg}).encode()).rstrip(b"=").decode()
    body = f"{head}.{mint(places).split('.')[1]}"
    mac = b"" if secret is None else hmac.new(secret, body.encode(), "sha256").digest()
    return f"{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def test_a_minted_token_says_who_and_for_what(places: Layout) -> None:
    """Subject, role, purpose and expiry come back."""
    token = mint_token(places, subject="alice", role=Role.auditor, purpose="audit", ttl_s=60)
    principal = TokenVerifier.of(places).verify(token)
    assert (principal.subject, principal.role, principal.purpose) == ("alice", Role.auditor, "audit")
    assert 0 < principal.expires_at - time.time() <= 60


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "elsewhere"},
        {"aud": "elsewhere"},
        {"exp": None},
        {"exp": int(time.time()) - 60},
        {"exp": "9999999999"},
        {"nbf": int(time.time()) + 600},
        {"sub": None},
        {"role": "king"},
        {"role": None},
    ],
)
def test_wrong_claims_are_refused(places: Layout, changes: dict[str, Any]) -> None:
    """Whatever is missing, of another, past or not yet."""
    with pytest.raises(Unauthenticated):
        TokenVerifier.of(places).verify(mint(places, **changes))


def test_other_keys_and_algorithms_are_refused(places: Layout) -> None:
    """Another key, none, HMAC with the public key, RSA, an unknown `crit`, a kid that is a path."""
    verifier = TokenVerifier.of(places)
    public = (Path(places.keys) / "issuer.pub.pem").read_bytes()
    tokens = [
        mint(places, key=ECKey.generate_key("P-256")),
        unsigned(places, "none"),
        unsigned(places, "nOnE"),
        unsigned(places, "HS256", public),
        mint(places, header={"alg": "RS256"}, key=RSAKey.generate_key(2048)),
        mint(places, header={"kid": "../../etc/passwd"}),
        mint(places)[:-4] + "AAAA",
        "a.b.c",
        "",
        "x" * 10_000,
    ]
    for token in tokens:
        with pytest.raises(Unauthenticated):
            verifier.verify(token)


def test_the_private_key_is_its_owners_alone(places: Layout) -> None:
    """And a second `ensure_issuer` keeps it."""
    private = Path(places.keys) / "issuer.pem"
    before = private.read_bytes()
    ensure_issuer(places)
    assert private.read_bytes() == before
    assert private.stat().st_mode & 0o077 == 0


def test_a_replica_remembers_a_token_only_until_it_expires(
    places: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached token is refused once its time is over; a role without the right always."""
    check = AccessCheck(TokenVerifier.of(places))
    bearer = f"Bearer {mint(places)}"
    assert check(bearer, Action.predict).subject == "alice"
    assert check(bearer, Action.predict).subject == "alice"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 120)
    with pytest.raises(Unauthenticated, match="expired"):
        check(bearer, Action.predict)
    monkeypatch.undo()
    with pytest.raises(AccessDenied):
        check(f"Bearer {mint(places, role='auditor')}", Action.predict)
    with pytest.raises(Unauthenticated):
        check(None, Action.predict)


def test_every_action_has_its_roles_and_all_else_is_denied() -> None:
    """An auditor reads metadata and no more."""
    assert ALLOWED.keys() == set(Action)
    assert [action for action in Action if allowed(Role.auditor, action)] == [Action.read_metadata]


def test_the_command_prints_a_token_or_says_what_is_missing(places: Layout, tmp_path: Path) -> None:
    """Nothing but the token on standard output; a file is written with mode 0600."""
    arguments = [
        sys.executable,
        "-m",
        "cluster.security.identity",
        "token",
        "--sub",
        "a",
        "--role",
        "service",
    ]
    printed = subprocess.run([*arguments, "--root", places.root], capture_output=True, text=True, check=True)
    assert TokenVerifier.of(places).verify(printed.stdout.strip()).subject == "a"
    target = tmp_path / "token"
    subprocess.run([*arguments, "--root", places.root, "--output", str(target)], check=True)
    assert target.stat().st_mode & 0o777 == 0o600
    missing = subprocess.run(
        [*arguments, "--root", str(tmp_path / "no")], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert "cluster.up" in missing.stderr
    with pytest.raises(ConfigError):
        TokenVerifier.of(Layout(str(tmp_path / "no")))
