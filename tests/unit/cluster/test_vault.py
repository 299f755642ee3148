"""Vault through the real hvac, against a double (tests/vault_double.py, not Vault): logins, errors, PKI, KV."""

from __future__ import annotations

import base64
import datetime as dt
import re
import socket
import string
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import hvac
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey

from cluster.errors import AccessDenied, ConfigError, InvalidRequest, Unauthenticated
from cluster.security.authorization.policy import Decision
from cluster.security.keys.gate import Gate, Operation
from cluster.security.keys.store import (
    KeyInfo,
    KeyNotFound,
    KeyRevoked,
    KeyStoreUnavailable,
    WrappedKeyInvalid,
)
from cluster.security.keys.vault import VaultKeyStore, flatten, unflatten
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
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from tests.vault_double import VaultDouble

NAME = "features/income/personal"
FLAT = "falaj.features.income.personal"
INFO = KeyInfo(name=NAME, column_class="personal", purposes=("credit_scoring",))
SECRET = b"a data key of thirty-two bytes.."
ROLE = AppRole(role_id="falaj", secret_id=lambda: "canary-secret-id")
SEGMENTS = st.from_regex(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,8}[A-Za-z0-9_])?", fullmatch=True)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=5).map("/".join)


@pytest.fixture
def double() -> Iterator[VaultDouble]:
    """A double with an AppRole."""
    with VaultDouble() as double:
        double.state.approles["falaj"] = "canary-secret-id"
        yield double


def store(double: VaultDouble, **token: object) -> VaultKeyStore:
    text = double.token(**token) if token else double.root_token  # type: ignore[arg-type]
    return VaultKeyStore(hvac.Client(url=double.address, token=text, timeout=5))


def signed(key: ECKey, **claims: object) -> str:
    return jwt.encode({"alg": "ES256"}, {"aud": "vault", "exp": int(time.time()) + 600, **claims}, key)


@given(NAMES)
def test_flattening_is_reversible_and_fits_transits_names(name: str) -> None:
    """Transit's names are words of letters, digits, `_`, `-` and `.` that begin and end with a word character."""
    assert unflatten(flatten(name)) == name
    assert re.fullmatch(r"\w([\w.-]*\w)?", flatten(name), re.ASCII)


@given(NAMES, NAMES)
def test_flattening_never_makes_two_names_one(one: str, other: str) -> None:
    """Equal words mean equal names."""
    assert (flatten(one) == flatten(other)) == (one == other)


def test_every_way_to_log_in_leads_to_a_token(double: VaultDouble, tmp_path: Path) -> None:
    """AppRole, an OIDC token, a pod's service account."""
    key = ECKey.generate_key("P-256")
    double.state.jwt_roles |= {("jwt", "jobs"): key, ("kubernetes", "pods"): key}
    (tmp_path / "token").write_text(signed(key) + "\n")
    ways = [
        ROLE,
        Jwt(role="jobs", token=lambda: signed(key)),
        Kubernetes(role="pods", token_path=tmp_path / "token"),
    ]
    for auth in ways:
        vault = VaultKeyStore(login(double.address, auth))
        vault.ensure(INFO)
        assert vault.unwrap(NAME, vault.wrap(NAME, SECRET)) == SECRET


def test_refused_logins_are_unauthenticated_and_show_no_secret(double: VaultDouble, tmp_path: Path) -> None:
    """Wrong secret, unknown role, foreign or expired signature, no token file."""
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
def test_a_token_never_goes_over_the_net_in_the_clear(address: str) -> None:
    """Plain http is for loopback alone."""
    with pytest.raises(ConfigError, match="must be https"):
        login(address, ROLE)


def test_login_ignores_a_token_from_the_environment(
    double: VaultDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hvac would take it."""
    monkeypatch.setenv("VAULT_TOKEN", "canary")
    assert login(double.address, ROLE).token.startswith("hvs.")
    double.state.approles.clear()
    with pytest.raises(Unauthenticated):
        login(double.address, ROLE)
    assert double.state.tokens_seen == {""}


def test_a_redirect_is_not_followed_with_the_token() -> None:
    """An answer that is not Vault's is said to be none."""
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/stolen")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(KeyStoreUnavailable, match="has no 'auth'"):
            login(f"http://127.0.0.1:{server.server_address[1]}", ROLE)
        server.shutdown()
    assert seen == ["/v1/auth/approle/login"]


def test_a_token_is_renewed_or_replaced(double: VaultDouble) -> None:
    """Renewed while it can be; replaced when it has expired, is at its end, or cannot be renewed."""
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


def test_a_token_is_kept_alive_through_an_outage(
    double: VaultDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper waits for a sealed Vault and then goes on; it ends when asked to."""
    monkeypatch.setattr("cluster.security.keys.vault_session.RETRY_S", 0.05)
    client, stopped = login(double.address, ROLE), threading.Event()
    client.token = expired = double.token(ttl_s=-1)
    double.state.sealed = True
    keeper = threading.Thread(target=lambda: keep_renewed(client, ROLE, stopped=stopped))
    keeper.start()
    before = len(double.state.requests)
    wait_until(lambda: len(double.state.requests) > before + 2)
    double.state.sealed = False
    wait_until(lambda: client.token != expired)
    stopped.set()
    keeper.join(10)
    assert not keeper.is_alive()


def wait_until(holds: object) -> None:
    """Poll with a deadline."""
    deadline, pause = time.monotonic() + 10, threading.Event()
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_what_vault_refuses_is_denied(double: VaultDouble) -> None:
    """A right that is missing, and a token that has expired; Vault answers both alike."""
    vault = store(double)
    vault.ensure(INFO)
    text = vault.wrap(NAME, SECRET)
    with pytest.raises(AccessDenied, match=f"refused to decrypt with key '{NAME}'"):
        store(double, denied=("transit/decrypt/",)).unwrap(NAME, text)
    with pytest.raises(AccessDenied, match="token has expired"):
        store(double, ttl_s=-1.0).info(NAME)


def test_an_absent_vault_is_unavailable(double: VaultDouble) -> None:
    """Sealed, or nobody listens: exit code 1, not the caller's mistake; the token is not in the error."""
    vault = store(double)
    vault.ensure(INFO)
    double.state.sealed = True
    with pytest.raises(KeyStoreUnavailable, match="Vault is sealed"):
        vault.info(NAME)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(KeyStoreUnavailable, match="Is its address right") as caught:
        VaultKeyStore(hvac.Client(url=f"http://127.0.0.1:{port}", token="canary", timeout=2)).names()
    assert caught.value.__cause__ is None


def test_keys_cannot_be_exported_and_bear_the_prefix(double: VaultDouble) -> None:
    """Two installations share one Vault without meeting."""
    vault, other = store(double), VaultKeyStore(store(double)._client, prefix="other")
    vault.ensure(INFO)
    other.ensure(INFO)
    assert sorted(double.state.transit) == [FLAT, "other.features.income.personal"]
    assert vault.names() == other.names() == [NAME]
    with pytest.raises(WrappedKeyInvalid):
        other.unwrap(NAME, vault.wrap(NAME, SECRET))


def test_names_of_strangers_in_the_same_engine_are_left_out(double: VaultDouble) -> None:
    """Transit's list is flat."""
    vault = store(double)
    for name in ("alien", "falaj", "falajx.y", "falaj...x"):
        hvac.Client(url=double.address, token=double.root_token).secrets.transit.create_key(name=name)
    vault.ensure(INFO)
    assert vault.names() == [NAME]


def test_the_laxness_of_vault_is_not_ours(double: VaultDouble) -> None:
    """Vault decrypts v0 as v1 and overlooks stray bits in base64; the store takes one spelling."""
    vault = store(double)
    vault.ensure(INFO)
    text = vault.wrap(NAME, b"x" * 16)  # 44 bytes sealed: two stray bits before the padding
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    lax = [text.replace(":v1:", ":v0:"), f"{text[:-2]}{alphabet[alphabet.index(text[-2]) + 1]}="]
    bound = base64.b64encode(NAME.encode()).decode()
    for other in lax:
        got = vault._transit.decrypt_data(name=FLAT, ciphertext=other, associated_data=bound)
        assert base64.b64decode(got["data"]["plaintext"]) == b"x" * 16
        with pytest.raises(WrappedKeyInvalid):
            vault.unwrap(NAME, other)


def test_the_name_is_authenticated_with_the_secret(double: VaultDouble) -> None:
    """The same Transit key without the name, or with another, does not decrypt."""
    vault = store(double)
    vault.ensure(INFO)
    text = vault.wrap(NAME, SECRET)
    for bound in (None, base64.b64encode(b"features/other/personal").decode()):
        with pytest.raises(hvac.exceptions.InvalidRequest, match="message authentication failed"):
            vault._transit.decrypt_data(name=FLAT, ciphertext=text, associated_data=bound)
    with pytest.raises(hvac.exceptions.InvalidRequest, match="message authentication failed"):
        vault._transit.rewrap_data(name=FLAT, ciphertext=text)


def test_a_revocation_that_was_cut_off_is_finished(double: VaultDouble) -> None:
    """The tombstone comes first: from then on the key is revoked, and revoking again destroys it."""
    vault = store(double)
    vault.ensure(INFO)
    with pytest.raises(AccessDenied):
        store(double, denied=("DELETE transit/",)).revoke(NAME)
    assert FLAT in double.state.transit
    with pytest.raises(KeyRevoked):
        vault.wrap(NAME, SECRET)
    vault.revoke(NAME)
    assert double.state.transit == {}
    with pytest.raises(KeyRevoked):
        vault.revoke(NAME)


def test_a_revocation_that_was_cut_off_is_finished_through_the_broker(double: VaultDouble) -> None:
    """By who may revoke the key as it was described; it is nobody else's business, and stays revoked."""
    vault = store(double)
    vault.ensure(INFO)
    with pytest.raises(AccessDenied):
        store(double, denied=("DELETE transit/",)).revoke(NAME)
    asked: list[KeyInfo] = []

    def decide(who: Principal, operation: Operation, info: KeyInfo) -> Decision:
        asked.append(info)
        return Decision(allowed=who.role is Role.admin, policies=())

    gate: Gate[Principal] = Gate(
        vault,
        verify=lambda role: Principal(subject="a", role=Role(role), purpose="", expires_at=0),
        decide=decide,
        audit=lambda denial: None,
    )
    request = {"op": "revoke", "name": NAME}
    assert not gate.answer(request | {"token": "auditor"})["ok"]
    assert FLAT in double.state.transit
    assert gate.answer(request | {"token": "admin"})["ok"]
    assert double.state.transit == {}
    assert asked == [INFO, INFO]
    for again in (request, {"op": "rotate", "name": NAME}):
        assert "KeyRevoked" in str(gate.answer(again | {"token": "admin"}))


def test_a_creation_that_was_cut_off_is_finished(double: VaultDouble) -> None:
    """A Transit key without a description is not found, and `ensure` describes it."""
    vault = store(double)
    with pytest.raises(AccessDenied):
        store(double, denied=("POST secret/",)).ensure(INFO)
    with pytest.raises(KeyNotFound):
        vault.wrap(NAME, SECRET)
    vault.ensure(INFO)
    assert vault.unwrap(NAME, vault.wrap(NAME, SECRET)) == SECRET


def test_descriptions_that_are_written_at_once_do_not_mix(double: VaultDouble) -> None:
    """Check-and-set: the last writer has seen the one before."""
    infos = [KeyInfo(name=NAME, purposes=(f"purpose{number}",)) for number in range(6)]
    threads = [threading.Thread(target=store(double).ensure, args=(info,)) for info in infos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (versions,) = double.state.kv.values()
    assert store(double).info(NAME) in infos
    assert {version["info"]["purposes"][0] for version in versions} == {
        f"purpose{number}" for number in range(6)
    }


def test_a_revocation_in_the_middle_of_a_change_stands(double: VaultDouble) -> None:
    """A description is written over the one that was read, or not at all."""

    class Overtaken(VaultKeyStore):
        def _record(self, name: str) -> Any:
            record = super()._record(name)
            if FLAT in double.state.transit:
                store(double).revoke(name)
            return record

    store(double).ensure(INFO)
    with pytest.raises(KeyRevoked):
        Overtaken(store(double)._client).ensure(KeyInfo(name=NAME, column_class="public"))
    with pytest.raises(KeyRevoked):
        store(double).info(NAME)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"info": {}, "revoked": False},
        {"info": KeyInfo(name="other").plain(), "revoked": False},
        {"info": INFO.plain()},
    ],
)
def test_a_description_of_something_else_is_refused(double: VaultDouble, content: dict[str, object]) -> None:
    """Swapped or edited by hand in KV: no policy is asked about it."""
    vault = store(double)
    vault.ensure(INFO)
    double.state.kv[f"falaj/keys/{flatten(NAME)}"].append(content)
    with pytest.raises(KeyStoreUnavailable, match="does not describe key"):
        vault.info(NAME)


def test_a_secret_is_read_from_kv(double: VaultDouble) -> None:
    """The newest version; a missing one is not found."""
    double.state.kv["falaj/postgres"] = [{"password": "old"}, {"password": "new"}]
    client = login(double.address, ROLE)
    assert read_secret(client, "falaj/postgres") == {"password": "new"}
    with pytest.raises(KeyNotFound, match="secret/falaj/none"):
        read_secret(client, "falaj/none")


def test_a_certificate_is_issued_with_its_key(double: VaultDouble) -> None:
    """Signed by the authority, for the names and addresses asked for, with the key that comes along."""
    double.state.pki_roles["edge"] = ("edge.falaj",)
    client = login(double.address, ROLE)
    issued = issue_certificate(
        client,
        role="edge",
        common_name="edge.falaj",
        alt_names=("localhost",),
        ip_addresses=("127.0.0.1",),
        ttl_s=3600,
    )
    certificate = x509.load_pem_x509_certificate(issued.certificate.encode())
    authority = x509.load_pem_x509_certificate(issued.ca_chain[0].encode())
    certificate.verify_directly_issued_by(authority)
    key = serialization.load_pem_private_key(issued.private_key.encode(), password=None)
    assert key.public_key() == certificate.public_key()
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["edge.falaj", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert issued.expires_at == certificate.not_valid_after_utc
    assert issued.expires_at - dt.datetime.now(dt.UTC) < dt.timedelta(hours=1)
    assert "PRIVATE" not in repr(issued)
    for role, name in (("none", "edge.falaj"), ("edge", "evil.example")):
        with pytest.raises(InvalidRequest, match=f"issue a certificate for {name}"):
            issue_certificate(client, role=role, common_name=name)
