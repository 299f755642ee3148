"""Login to Vault and its renewal, KV and PKI, through hvac and a Vault double (tests/servers/vault_double.py)."""

from __future__ import annotations

import datetime as dt
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from joserfc import jwt
from joserfc.jwk import ECKey

from cluster.errors import ConfigError, InvalidRequest, Unauthenticated
from cluster.security.keys.store import KeyNotFound, KeyStoreUnavailable
from cluster.security.keys.vault import VaultKeyStore
from cluster.security.keys.vault_session import (
    AppRole,
    Jwt,
    Kubernetes,
    issue_certificate,
    keep_renewed,
    login,
    read_secret,
    renew,
)
from tests.servers.key_broker_world import INFO, NAME, SECRET
from tests.servers.polling import wait_until
from tests.servers.vault_double import VaultDouble

ROLE = AppRole(role_id="falaj", secret_id=lambda: "canary-secret-id")


def signed(key: ECKey, **claims: object) -> str:
    return jwt.encode({"alg": "ES256"}, {"aud": "vault", "exp": int(time.time()) + 600, **claims}, key)


def test_every_login_method_works(double: VaultDouble, tmp_path: Path) -> None:
    """AppRole, an OIDC token, and a service account of a pod."""
    key = ECKey.generate_key("P-256")
    double.state.jwt_roles |= {("jwt", "jobs"): key, ("kubernetes", "pods"): key}
    (tmp_path / "token").write_text(signed(key) + "\n")
    pod = Kubernetes(role="pods", token_path=tmp_path / "token")
    for auth in (ROLE, Jwt(role="jobs", token=lambda: signed(key)), pod):
        vault = VaultKeyStore(login(double.address, auth))
        vault.ensure(INFO)
        assert vault.unwrap(NAME, vault.wrap(NAME, SECRET)) == SECRET


def test_refused_login_is_unauthenticated_and_shows_no_secret(double: VaultDouble, tmp_path: Path) -> None:
    """Wrong secret, unknown role, foreign or expired signature, missing token file."""
    key, foreign = ECKey.generate_key("P-256"), ECKey.generate_key("P-256")
    double.state.jwt_roles |= {("jwt", "jobs"): key, ("kubernetes", "pods"): key}
    (tmp_path / "token").write_text(signed(foreign))
    late = signed(key, exp=int(time.time()) - 600)
    for auth in (
        AppRole(role_id="falaj", secret_id=lambda: "canary-wrong"),
        AppRole(role_id="nobody", secret_id=lambda: "canary-secret-id"),
        Jwt(role="jobs", token=lambda: signed(foreign)),
        Jwt(role="jobs", token=lambda: late),
        Jwt(role="jobs", token=lambda: signed(key, aud="somebody else")),
        Jwt(role="nobody", token=lambda: signed(key)),
        Kubernetes(role="pods", token_path=tmp_path / "token"),
        Kubernetes(role="pods", token_path=tmp_path / "missing"),
        AppRole(role_id="falaj", secret_id=lambda: "canary-secret-id", mount="elsewhere"),
    ):
        with pytest.raises(Unauthenticated) as caught:
            login(double.address, auth)
        for shown in (str(caught.value), repr(auth), repr(caught.value.__cause__)):
            assert "canary" not in shown
            assert late[-40:] not in shown


@pytest.mark.parametrize(
    "address", ["http://vault.example.com:8200", "vault:8200", "", "http://127.0.0.1.evil.com"]
)
def test_login_over_plain_http_is_refused(address: str) -> None:
    """Plain http is allowed for loopback only."""
    with pytest.raises(ConfigError, match="must be https"):
        login(address, ROLE)


def test_login_ignores_a_token_from_the_environment(
    double: VaultDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hvac itself would use it."""
    monkeypatch.setenv("VAULT_TOKEN", "canary")
    assert login(double.address, ROLE).token.startswith("hvs.")
    double.state.approles.clear()
    with pytest.raises(Unauthenticated):
        login(double.address, ROLE)
    assert double.state.tokens_seen == {""}


def test_redirect_is_not_followed() -> None:
    """The error says that the answer is not from Vault."""
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/stolen")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Do not log."""

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(KeyStoreUnavailable, match="has no 'auth'"):
            login(f"http://127.0.0.1:{server.server_address[1]}", ROLE)
        server.shutdown()
    assert seen == ["/v1/auth/approle/login"]


def test_token_is_renewed_or_replaced(double: VaultDouble) -> None:
    """It is replaced if it has expired, is near its maximum lifetime, or cannot be renewed."""
    client = login(double.address, ROLE)
    first = client.token
    assert renew(client, ROLE) == 3600
    assert client.token == first
    for token in (double.token(ttl_s=-1), double.token(ttl_s=30), double.token(renewable=False)):
        client.token = token
        assert renew(client, ROLE) == 3600
        assert client.token != token
    double.state.approles.clear()
    client.token = double.token(ttl_s=-1)
    with pytest.raises(Unauthenticated):
        renew(client, ROLE)


def test_login_survives_an_outage(double: VaultDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """The renewal waits for a sealed Vault, then continues. It ends when `stopped` is set."""
    monkeypatch.setattr("cluster.security.keys.vault_session.RETRY_S", 0.05)
    client, stopped = login(double.address, ROLE), threading.Event()
    client.token = expired = double.token(ttl_s=-1)
    double.state.sealed = True
    renewal = threading.Thread(target=lambda: keep_renewed(client, ROLE, stopped=stopped))
    renewal.start()
    before = len(double.state.requests)
    wait_until(lambda: len(double.state.requests) > before + 2)
    double.state.sealed = False
    wait_until(lambda: client.token != expired)
    stopped.set()
    renewal.join(10)
    assert not renewal.is_alive()


def test_secret_is_read_from_kv(double: VaultDouble) -> None:
    """The newest version is returned. A missing secret is KeyNotFound."""
    double.state.kv["falaj/postgres"] = [{"password": "old"}, {"password": "new"}]
    client = login(double.address, ROLE)
    assert read_secret(client, "falaj/postgres") == {"password": "new"}
    with pytest.raises(KeyNotFound, match="secret/falaj/none"):
        read_secret(client, "falaj/none")


def test_certificate_is_issued_with_its_key(double: VaultDouble) -> None:
    """The authority signs it for the requested names and addresses, and the key fits."""
    double.state.pki_roles["edge"] = ("edge.falaj",)
    client = login(double.address, ROLE)
    names = {"common_name": "edge.falaj", "alt_names": ("localhost",), "ip_addresses": ("127.0.0.1",)}
    issued = issue_certificate(client, role="edge", ttl_s=3600, **names)  # type: ignore[arg-type]
    certificate = x509.load_pem_x509_certificate(issued.certificate.encode())
    authority = x509.load_pem_x509_certificate(issued.ca_chain[0].encode())
    certificate.verify_directly_issued_by(authority)
    key = serialization.load_pem_private_key(issued.private_key.encode(), password=None)
    assert key.public_key() == certificate.public_key()
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternatives.get_values_for_type(x509.DNSName) == ["edge.falaj", "localhost"]
    assert [str(each) for each in alternatives.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert issued.expires_at == certificate.not_valid_after_utc
    assert issued.expires_at - dt.datetime.now(dt.UTC) < dt.timedelta(hours=1)
    assert "PRIVATE" not in repr(issued)
    for role, name in (("none", "edge.falaj"), ("edge", "evil.example")):
        with pytest.raises(InvalidRequest, match=f"issue a certificate for {name}"):
            issue_certificate(client, role=role, common_name=name)
