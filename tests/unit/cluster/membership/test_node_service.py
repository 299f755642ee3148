"""Tests of what the head answers to its nodes."""

from __future__ import annotations

import http.server
import socket
import ssl
import tempfile
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import AccessDenied, ConfigError, InvalidRequest, Unauthenticated
from cluster.ledger.events import NodeLeft
from cluster.membership.head_client import HeadClient
from cluster.membership.members import current_members
from cluster.membership.relay import Relay, serve_dashboard, serve_jobs
from cluster.node.other_nodes import status_of
from cluster.node.parts import State
from cluster.security.keys.broker import Broker
from cluster.security.keys.client import BrokerKeyStore, ask_broker
from cluster.security.keys.gate import Gate
from cluster.security.keys.keyring import open_local
from cluster.security.keys.store import KeyInfo, KeyNotFound, KeyStoreUnavailable
from cluster.security.tokens.intent import mint_intent
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from tests.servers.key_broker_world import Person, decide, verify
from tests.servers.polling import wait_until
from tests.servers.ports import free_port
from tests.unit.cluster.membership.conftest import Head


def test_requests_need_the_certificate_of_a_node(head: Head) -> None:
    """A node that left has the same certificate as before, and gets nothing any more."""
    _, client = head.join()
    assert client.request("report", parts={"raylet": "running"}) == {"session": ""}
    client.request("leave", reason="left")
    with pytest.raises(Unauthenticated, match="it has left"):
        client.request("nodes")
    [left] = head.ledger.entries(NodeLeft)
    assert left.payload["reason"] == "left"
    assert current_members(head.ledger, "abc") == {}


def test_a_client_without_certificate_may_only_join(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head asks for the certificate in the handshake, and answers nothing else without it."""
    _, client = head.join()
    without = ssl.create_default_context(cafile=str(head.record.layout.tls) + "/ca.pem")
    monkeypatch.setattr("cluster.membership.head_client.node_context", lambda tls: without)
    for operation in ("nodes", "jwks", "service_token", "report"):
        with pytest.raises(Unauthenticated, match="needs a node's certificate"):
            client.request(operation)


def test_replicas_of_a_node_get_tokens_of_their_own_kind_only(head: Head) -> None:
    """The head's issuer signs them. A node cannot become an admin."""
    _, client = head.join()
    token = client.request("service_token", subject="service:loan", purpose="credit_scoring")
    principal = Trust.of(head.config.identity.issuer, head.record.layout).tokens.verify(str(token))
    assert (principal.subject, principal.role) == ("service:loan", Role.service)
    with pytest.raises(AccessDenied, match="tokens of replicas only"):
        client.request("service_token", subject="user:alice", purpose="")


def test_intents_reach_other_nodes_by_their_random_name(head: Head) -> None:
    """Only valid intents are accepted, and only names that a job chose."""
    _, client = head.join()
    principal = Principal(subject="alice", role=Role.admin, purpose="", expires_at=int(time.time()))
    intent = mint_intent(head.record.layout, principal, entrypoint="feature_jobs.ingest")
    name = f"feature_jobs.ingest-{uuid.uuid4().hex}.jwt"
    client.request("deposit", name=name, intent=intent)
    assert client.request("intent", name=name) == intent
    client.request("deposit", name=name, intent=intent)
    other = mint_intent(
        head.record.layout, replace(principal, subject="bob"), entrypoint="feature_jobs.ingest"
    )
    with pytest.raises(AccessDenied, match="another subject's"):
        client.request("deposit", name=name, intent=other)
    with pytest.raises(Unauthenticated, match=r"not for 'jobs\.train'"):
        client.request("deposit", name=name.replace("feature_jobs.ingest", "jobs.train"), intent=intent)
    client.request("withdraw", name=name)
    with pytest.raises(ConfigError, match="cannot be read"):
        client.request("intent", name=name)
    with pytest.raises(Unauthenticated):
        client.request("deposit", name=name, intent=f"{intent}x")
    for invalid in ("supervisor.jwt", f"../{name}", "issuer.pem"):
        with pytest.raises(InvalidRequest, match="name of an intent"):
            client.request("intent", name=invalid)


def test_keys_come_from_the_heads_broker_with_the_callers_token(head: Head) -> None:
    """The node's socket speaks as the head's: an allowed caller gets the key, another one the policy's refusal."""
    _, client = head.join()
    socket_folder = head.folder / "run"
    head.service.record = replace(head.record, key_socket=str(socket_folder / "head" / "s"))
    regions = []

    def locate(principal: Person, region: str) -> Person:
        regions.append(region)
        return principal

    gate = Gate(
        open_local(head.folder / "ring"),
        verify=verify,
        decide=decide,
        audit=lambda denial: None,
        locate=locate,
    )
    stopped = threading.Event()
    brokers = [
        Broker(gate, socket_folder / "head" / "s"),
        Broker(Relay(client), socket_folder / "node" / "s"),
    ]
    socket_folder.mkdir(mode=0o700)
    threads = [threading.Thread(target=broker.run, args=(stopped,)) for broker in brokers]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while not all((socket_folder / name / "s").exists() for name in ("head", "node")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store = BrokerKeyStore(socket_folder / "node" / "s", lambda: "admin/any")
        store.ensure(KeyInfo(name="k", column_class="personal", purposes=("credit_scoring",)))
        assert store.unwrap("k", store.wrap("k", b"a secret")) == b"a secret"
        assert store.rotate("k") == 2
        other = BrokerKeyStore(socket_folder / "node" / "s", lambda: "bob/marketing")
        with pytest.raises(AccessDenied, match="bob may not"):
            other.wrap("k", b"x")
        assert set(regions) == {"eu"}
        with pytest.raises(KeyNotFound):  # the region is the ledger's, not the message's
            ask_broker(
                socket_folder / "node" / "s",
                {"op": "info", "name": "x", "token": "admin/any", "node_region": "us"},
            )
        assert set(regions) == {"eu"}
        token = ask_broker(
            socket_folder / "node" / "s", {"op": "service_token", "subject": "service:a", "purpose": ""}
        )
        assert str(token).count(".") == 2
    finally:
        stopped.set()
        for thread in threads:
            thread.join(10)


def test_a_head_that_does_not_answer_is_a_temporary_failure(head: Head) -> None:
    """The caller gets the same error as for a broker that is down, so replicas try again."""
    _, client = head.join()
    lost = HeadClient(f"127.0.0.1:{free_port()}", tls=client._tls, address="127.0.0.2")
    answer = Relay(lost).answer({"op": "names", "token": "t"})
    assert answer["error"] == KeyStoreUnavailable.__name__


def test_dashboard_is_reachable_on_the_nodes_loopback(head: Head) -> None:
    """Large answers pass whole, in both directions at the same time."""

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    _, client = head.join()
    dashboard = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=dashboard.serve_forever, daemon=True).start()
    head.service.record = replace(
        head.record, dashboard_url=f"http://127.0.0.1:{dashboard.server_address[1]}"
    )
    port, stopped = free_port(), threading.Event()
    tunnel = threading.Thread(target=serve_dashboard, args=(client, port, stopped))
    tunnel.start()
    try:
        body = bytes(range(256)) * 20_000
        deadline = time.monotonic() + 10
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                connection.request("POST", "/", body=body)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert connection.getresponse().read() == body
        connection.close()
    finally:
        stopped.set()
        tunnel.join(10)
        dashboard.shutdown()
        dashboard.server_close()


def test_job_service_is_reachable_at_the_nodes_own_socket(head: Head) -> None:
    """Only the owner may connect. While the job service is down, or too many connections to it are open, a connection
    ends without an answer. The node's other requests are answered then, too."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        _, client = head.join()
        head.service.record = replace(head.record, runtime_dir=folder)
        path, stopped = Path(folder) / "node.sock", threading.Event()
        tunnel = threading.Thread(target=serve_jobs, args=(client, path, stopped))
        tunnel.start()
        try:
            wait_until(lambda: path.exists() and path.stat().st_mode & 0o777 == 0o600)
            assert ask_socket(path) == b""
            with socket.socket(socket.AF_UNIX) as service:
                service.bind(head.service.record.jobs_socket)
                service.listen()
                answering = threading.Thread(target=echo_once, args=(service,))
                answering.start()
                assert ask_socket(path) == b"hello"
                answering.join(10)
                head.service._tunnels = threading.BoundedSemaphore(1)
                head.service._tunnels.acquire()
                assert ask_socket(path) == b""
                assert client.request("nodes")
            assert path.stat().st_mode & 0o777 == 0o600
        finally:
            stopped.set()
            tunnel.join(10)


def ask_socket(path: Path) -> bytes:
    """Send five bytes, and return the answer until the end of the connection; b"" if it is reset."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        try:
            connection.sendall(b"hello")
            return b"".join(iter(lambda: connection.recv(1024), b""))
        except (ConnectionResetError, BrokenPipeError):
            return b""


def echo_once(listener: socket.socket) -> None:
    """Answer one connection with what it sends first."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(connection.recv(1024))


def test_status_names_what_is_dead(head: Head) -> None:
    """A node that reports no more counts as dead, and one that lacks a part is shown with it."""
    node_id, client = head.join()
    [waiting] = map(status_of, head.service._nodes())
    assert (waiting.node_id, waiting.state) == (node_id, State.silent)
    client.request("report", parts={"raylet": "running", "key broker": "dead"})
    [lacking] = map(status_of, client.request("nodes"))  # type: ignore[call-overload]
    assert (lacking.state, lacking.text) == (State.silent, "lacks key broker (dead)")
    client.request("report", parts={"raylet": "running"})
    [running] = map(status_of, head.service._nodes())
    assert running.state is State.running
    head.service.clock = lambda: time.monotonic() + 60
    [silent] = map(status_of, head.service._nodes())
    assert silent.text.startswith("dead: no report for 6")


def test_a_silent_client_does_not_stop_others(head: Head) -> None:
    """It is cut after some seconds, and never blocks the loop that accepts connections."""
    host, port = head.url.split(":")
    with socket.create_connection((host, int(port))):
        _, client = head.join()
        assert client.request("nodes") is not None


def test_expired_certificate_is_named(head: Head, tmp_path: Path) -> None:
    """The node learns it before it asks, and what to do."""
    _, client = head.join()
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    now = dt.datetime.now(dt.UTC)
    expired = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=2))
        .not_valid_after(now - dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (client._tls / "node.pem").write_bytes(expired.public_bytes(pem))
    (client._tls / "node.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(ConfigError, match=r"expired on .*cluster\.leave"):
        client.request("nodes")
