"""Tests of the head's key for join tokens."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

import pytest

from cluster.errors import ConfigError, Unauthenticated
from cluster.membership import join_token
from cluster.storage import local
from tests.unit.cluster.membership.conftest import Head


@pytest.mark.parametrize("damaged", [b"", b"\n", b"abc", b"0" * 63])
def test_no_token_is_valid_with_a_damaged_key(head: Head, damaged: bytes) -> None:
    """A process that was killed while it wrote the key could leave an empty file, and anyone can sign with that."""
    places = head.record.layout
    (local(places.keys) / join_token.KEY_NAME).write_bytes(damaged)
    body = "falaj-join.9999999999.00"
    digest = hmac.digest(damaged.strip(), body.encode(), hashlib.sha256)
    forged = f"{body}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"
    with pytest.raises(ConfigError, match=r"join\.key is damaged.*Remove it.*cluster\.up"):
        join_token.check(places, forged)
    with pytest.raises(ConfigError, match="is damaged"):
        join_token.mint(places)


def test_an_empty_key_is_replaced_at_the_next_start(head: Head) -> None:
    """A whole key stays, so that the tokens signed with it stay valid."""
    places = head.record.layout
    path = local(places.keys) / join_token.KEY_NAME
    path.write_bytes(b"")
    join_token.ensure_join_key(places)
    token = join_token.mint(places).text
    join_token.ensure_join_key(places)
    join_token.check(places, token)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_token_that_is_valid_too_long_is_refused(head: Head) -> None:
    """The limit also holds for a token that was made elsewhere with the head's key."""
    places = head.record.layout
    far = join_token.mint(places, now=4_000_000_000).text
    with pytest.raises(Unauthenticated, match="valid for too long"):
        join_token.check(places, far)


def test_token_needs_a_cluster_that_machines_can_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one, the command says how to start one, and writes nothing."""
    output = tmp_path / "node.join"
    monkeypatch.setattr("sys.argv", ["join_token", "--output", str(output), "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        join_token.main()
    assert ended.value.code == 2
    assert "No cluster that other machines can join is up" in capsys.readouterr().err
    assert not output.exists()
