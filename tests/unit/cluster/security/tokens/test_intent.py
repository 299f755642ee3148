"""Intents: valid for one entrypoint and a limited time, in a private file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.tokens.intent import (
    FILE_VARIABLE,
    INTENT_AUDIENCE,
    INTENT_TYPE,
    MAX_TTL_S,
    IntentVerifier,
    intent_file,
    mint_intent,
    read_intent,
    write_intent,
)
from cluster.security.tokens.issuer import mint_token, rotate_issuer
from cluster.security.tokens.principal import Principal, TokenVerifier, local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import TokenRules
from cluster.storage import Layout

ENTRYPOINT = "feature_jobs.ingest"


@pytest.fixture
def alice(places: Layout) -> Principal:
    """The principal of an access token."""
    granted = {"purpose": "credit", "tenant": "north", "scope": "model:a model:b"}
    return TokenVerifier.of(places).verify(
        mint_token(places, subject="alice", role=Role.data_engineer, **granted)
    )


@pytest.fixture
def verifier(places: Layout) -> IntentVerifier:
    return IntentVerifier.of(places)


def forged(places: Layout, *, typ: str | None = INTENT_TYPE, **changes: Any) -> str:
    """Return an intent with changed claims, signed with the issuer's real key."""
    key, now = ECKey.import_key((Path(places.keys) / "issuer.pem").read_bytes()), int(time.time())
    claims = {"iss": "falaj-dev", "aud": INTENT_AUDIENCE, "sub": "alice", "role": "data_engineer"}
    claims |= {"entrypoint": ENTRYPOINT, "jti": "1", "exp": now + 60} | changes
    present_claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode({"alg": "ES256", "kid": key.thumbprint()}, present_claims, key, default_type=typ)


def test_intent_gives_its_principal_and_entrypoint(
    places: Layout, alice: Principal, verifier: IntentVerifier, tmp_path: Path
) -> None:
    """Only the owner can read the file."""
    path = tmp_path / "intent"
    write_intent(path, mint_intent(places, alice, entrypoint=ENTRYPOINT, ttl_s=60))
    assert path.stat().st_mode & 0o777 == 0o600
    intent = read_intent(path, verifier, entrypoint=ENTRYPOINT)
    principal = intent.principal
    assert (principal.subject, principal.role, principal.purpose) == ("alice", Role.data_engineer, "credit")
    assert (principal.tenant, principal.entrypoint, intent.entrypoint) == ("north", ENTRYPOINT, ENTRYPOINT)
    assert intent.intent_id
    assert 50 < principal.expires_at - time.time() <= 60


def test_replaced_intent_is_read_from_the_same_path(
    places: Layout, alice: Principal, verifier: IntentVerifier, tmp_path: Path
) -> None:
    """A worker reads the newest intent from the same path."""
    path = tmp_path / "intent"
    for ttl_s in (60, 120):
        write_intent(path, mint_intent(places, alice, entrypoint=ENTRYPOINT, ttl_s=ttl_s))
        assert read_intent(path, verifier, entrypoint=ENTRYPOINT).principal.subject == "alice"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["intent"]


def test_access_token_and_intent_cannot_replace_each_other(
    places: Layout, alice: Principal, verifier: IntentVerifier
) -> None:
    """They differ by type. If an issuer cannot set the type, they differ by audience."""
    access = mint_token(places, subject="alice", role=Role.data_engineer, purpose="credit")
    intent = mint_intent(places, alice, entrypoint=ENTRYPOINT)
    with pytest.raises(Unauthenticated, match="type"):
        verifier.verify(access)
    with pytest.raises(Unauthenticated, match="type"):
        TokenVerifier.of(places).verify(intent)
    with pytest.raises(Unauthenticated, match="aud"):
        TokenVerifier.of(places).verify(forged(places, typ="JWT"))
    rules_without_type = TokenRules(
        issuer="falaj-dev", audience=INTENT_AUDIENCE, types=frozenset({"jwt", INTENT_TYPE})
    )
    any_type = IntentVerifier(local_keys(places), rules=rules_without_type)
    assert any_type.verify(forged(places, typ="JWT")).entrypoint == ENTRYPOINT
    with pytest.raises(Unauthenticated, match="aud"):
        any_type.verify(access)


@pytest.mark.parametrize(
    "changes",
    [
        *({"typ": value} for value in ("JWT", None)),
        *({"aud": value} for value in ("falaj", ["falaj"])),
        *({"entrypoint": value} for value in (None, "", ["feature_jobs.ingest"], "feature_jobs.ingest; rm")),
        *({"entrypoint": value} for value in ("../ingest", "feature_jobs.materialize")),
        *({"exp": value} for value in (None, 1, int(time.time()) + 30 * 86_400)),
        *({"iss": "somebody"}, {"jti": None}, {"role": "king"}),
        {"nbf": int(time.time()) + 86_400},
    ],
    ids=",".join,
)
def test_wrong_intent_is_refused(places: Layout, verifier: IntentVerifier, changes: dict[str, Any]) -> None:
    """A wrong claim is refused, although the issuer signed it."""
    assert verifier.verify(forged(places), entrypoint=ENTRYPOINT).principal.subject == "alice"
    with pytest.raises(Unauthenticated):
        verifier.verify(forged(places, **changes), entrypoint=ENTRYPOINT)


def test_expired_intent_is_refused(places: Layout, alice: Principal) -> None:
    """The leeway is that of access tokens."""
    token = mint_intent(places, alice, entrypoint=ENTRYPOINT, ttl_s=60)
    late = IntentVerifier(local_keys(places), clock=lambda: time.time() + 120)
    with pytest.raises(Unauthenticated, match="expired"):
        late.verify(token, entrypoint=ENTRYPOINT)


def test_intent_ends_with_its_key(fresh: Layout, alice: Principal) -> None:
    """A rotation with keep_s=0 ends intents."""
    verifier, token = IntentVerifier.of(fresh), mint_intent(fresh, alice, entrypoint=ENTRYPOINT)
    rotate_issuer(fresh, keep_s=0)
    with pytest.raises(Unauthenticated, match="key"):
        verifier.verify(token)


def test_intent_cannot_be_exchanged_for_another_entrypoint(
    places: Layout, alice: Principal, verifier: IntentVerifier
) -> None:
    """A job cannot get an intent for another entrypoint, or for longer than a day."""
    job = verifier.verify(mint_intent(places, alice, entrypoint=ENTRYPOINT)).principal
    assert mint_intent(places, job, entrypoint=ENTRYPOINT)
    with pytest.raises(ConfigError, match="cannot become"):
        mint_intent(places, job, entrypoint="jobs.train")
    with pytest.raises(ConfigError, match="shorter"):
        mint_intent(places, alice, entrypoint=ENTRYPOINT, ttl_s=MAX_TTL_S + 1)
    for name in ("", "a b", "../x", "A;B", "jobs..train"):
        with pytest.raises(ConfigError, match="not a module name"):
            mint_intent(places, alice, entrypoint=name)


def test_intent_file_must_be_private(
    places: Layout, alice: Principal, verifier: IntentVerifier, tmp_path: Path
) -> None:
    """A file with wider modes, a link, a folder, a pipe and a missing file are refused."""
    path, link, pipe = tmp_path / "intent", tmp_path / "link", tmp_path / "pipe"
    write_intent(path, mint_intent(places, alice, entrypoint=ENTRYPOINT))
    link.symlink_to(path)
    os.mkfifo(pipe, 0o600)
    for bad in (link, pipe, tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError):
            read_intent(bad, verifier, entrypoint=ENTRYPOINT)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="0600"):
            read_intent(path, verifier, entrypoint=ENTRYPOINT)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a" * 100_000, b"a.b.c"])
def test_file_without_a_token_is_unauthenticated(
    verifier: IntentVerifier, tmp_path: Path, content: bytes
) -> None:
    """The message does not contain the file's content."""
    path = tmp_path / "intent"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(Unauthenticated) as refusal:
        read_intent(path, verifier)
    assert "aaaa" not in str(refusal.value)


def test_configured_file_takes_precedence_over_the_environment() -> None:
    """Without both, there is no file."""
    assert intent_file("/a", {FILE_VARIABLE: "/b"}) == Path("/a")
    assert intent_file(None, {FILE_VARIABLE: "/b"}) == Path("/b")
    assert intent_file(None, {}) is None


def test_token_is_not_in_a_repr(places: Layout, alice: Principal, verifier: IntentVerifier) -> None:
    """Intent and verifier can be logged safely."""
    token = mint_intent(places, alice, entrypoint=ENTRYPOINT)
    shown = f"{verifier.verify(token)!r} {verifier!r} {json.dumps(verifier.verify(token).entrypoint)}"
    assert not any(part in shown for part in token.split("."))
