"""A replica's own check of tokens, and how long it caches them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.errors import AccessDenied, Unauthenticated
from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, StrangersRefused
from cluster.security.authorization.audit import Append
from cluster.security.authorization.policy import Action, Policy, Resource
from cluster.security.tokens.issuer import ensure_issuer, mint_token, rotate_issuer
from cluster.security.tokens.oidc import FileKeys
from cluster.security.tokens.principal import Principal, TokenVerifier
from cluster.security.tokens.roles import Role
from cluster.storage import Layout
from serve_apps.replica import access
from serve_apps.replica.access import MAX_CACHED_S, AccessCheck, append_in_background
from tests.servers.polling import wait_until


@pytest.fixture
def places(tmp_path: Path) -> Layout:
    layout = Layout(str(tmp_path))
    ensure_issuer(layout)
    return layout


def bearer(places: Layout, role: Role = Role.service, *, ttl_s: int = 60) -> str:
    return f"Bearer {mint_token(places, subject='alice', role=role, purpose='test', ttl_s=ttl_s)}"


def check_of(verifier: TokenVerifier, append: Append | None = None) -> AccessCheck:
    return AccessCheck(
        verifier,
        policy=Policy.load(),
        resource=Resource(kind="model", name="m"),
        environment="local",
        append=append or (lambda event, *, actor: None),
    )


class CountingVerifier(TokenVerifier):
    """Counts signature checks; the test sets its clock."""

    def __init__(self, places: Layout) -> None:
        self.at, self.verified = time.time(), 0
        super().__init__(FileKeys(Path(places.keys) / "jwks.json"), clock=lambda: self.at)

    def verify(self, token: str) -> Principal:
        self.verified += 1
        return super().verify(token)


def test_cached_token_is_refused_after_it_expires(places: Layout) -> None:
    verifier, token = CountingVerifier(places), bearer(places, ttl_s=5)
    check = check_of(verifier)
    assert check(token, Action.predict) == check(token, Action.predict)
    assert verifier.verified == 1
    over_s = 5 + verifier.rules.leeway_s + 1
    assert over_s < MAX_CACHED_S, "or this would only show that nothing is remembered longer than that"
    verifier.at += over_s
    with pytest.raises(Unauthenticated, match="expired"):
        check(token, Action.predict)


def test_cached_token_ends_with_its_key(places: Layout) -> None:
    """A minute after a key rotation without overlap, a cached token is refused."""
    verifier, token = CountingVerifier(places), bearer(places, ttl_s=3600)
    check = check_of(verifier)
    check(token, Action.predict)
    rotate_issuer(places, keep_s=0)
    assert check(token, Action.predict).subject == "alice"
    verifier.at += MAX_CACHED_S
    with pytest.raises(Unauthenticated, match="key"):
        check(token, Action.predict)


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "Bearer a.b.c"])
def test_invalid_authorization_header_is_unauthenticated(places: Layout, header: str | None) -> None:
    """Missing, of another scheme, or not a token."""
    with pytest.raises(Unauthenticated):
        check_of(TokenVerifier.of(places))(header, Action.predict)


def test_denials_are_recorded_and_unauthenticated_requests_counted(places: Layout, tmp_path: Path) -> None:
    """Both are appended to the ledger in the background."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    check = check_of(TokenVerifier.of(places), append_in_background(ledger))
    for _ in range(3):
        with pytest.raises(Unauthenticated):
            check(None, Action.predict)
    with pytest.raises(AccessDenied, match="predict"):
        check(bearer(places, Role.auditor), Action.predict)
    check._decisions.flush()
    wait_until(lambda: ledger.head() >= 2)
    events = {entry.type: entry for entry in ledger.entries()}
    assert (events["AccessDecided"].actor, events["AccessDecided"].payload["resource"]) == ("alice", "m")
    assert events["StrangersRefused"].payload["count"] == 3


@pytest.mark.parametrize("way", ["closed", "a while later"])
def test_close_records_the_last_counts_of_unauthenticated_requests(
    places: Layout, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Although no request follows them."""
    written: list[LedgerEvent] = []
    monkeypatch.setattr(access, "FLUSH_S", 3600.0 if way == "closed" else 0.01)
    check = check_of(TokenVerifier.of(places), lambda event, *, actor: written.append(event))
    with pytest.raises(Unauthenticated):
        check(None, Action.predict)
    if way == "closed":
        check.close()
    wait_until(lambda: bool(written))
    assert [type(event) for event in written] == [StrangersRefused]
    check.close()
