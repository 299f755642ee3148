"""A replica's own check of tokens, and how long it remembers them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.errors import AccessDenied, Unauthenticated
from cluster.security.identity import TokenVerifier, ensure_issuer, mint_token
from cluster.security.policy import Action, Role
from cluster.storage import Layout
from serve_apps.access import AccessCheck


@pytest.fixture
def places(tmp_path: Path) -> Layout:
    layout = Layout(str(tmp_path))
    ensure_issuer(layout)
    return layout


def bearer(places: Layout, role: Role = Role.service) -> str:
    return f"Bearer {mint_token(places, subject='alice', role=role, purpose='test', ttl_s=60)}"


def test_a_token_is_remembered_only_until_it_expires(places: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached token is refused once its time is over."""
    check, token = AccessCheck(TokenVerifier.of(places)), bearer(places)
    assert check(token, Action.predict) == check(token, Action.predict)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 120)
    with pytest.raises(Unauthenticated, match="expired"):
        check(token, Action.predict)


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "Bearer a.b.c"])
def test_no_valid_token_is_unauthenticated(places: Layout, header: str | None) -> None:
    """Missing, of another scheme, or no token at all."""
    with pytest.raises(Unauthenticated):
        AccessCheck(TokenVerifier.of(places))(header, Action.predict)


def test_a_role_without_the_right_is_denied(places: Layout) -> None:
    """An auditor may read metadata, not predict."""
    check, token = AccessCheck(TokenVerifier.of(places)), bearer(places, Role.auditor)
    assert check(token, Action.read_metadata).role is Role.auditor
    with pytest.raises(AccessDenied, match="predict"):
        check(token, Action.predict)
