"""Servers that other machines reach: TLS by the node's certificate, verified by the edge, and the edge's secret."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import ssl
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from ray.serve._private import http_util
from ray.serve._private import replica as serve_replica
from ray.serve.config import HTTPOptions
from starlette.responses import JSONResponse

from cluster.errors import ConfigError
from cluster.host.this_node import RECORD_VARIABLE
from cluster.security.edge_proof import edge_proof
from cluster.security.tls.certificates import ensure_tls, write_node_certificate
from cluster.storage import Layout
from serve_apps.predictor.shadow_replicas import Connections
from serve_apps.replica import listening
from serve_apps.replica.direct import DirectAnswers, middlewares
from serve_apps.replica.edge_headers import PROOF
from serve_apps.replica.edge_only import EdgeOnly
from serve_apps.replica.targets import uses_tls
from tests.servers.edge import Edge
from tests.servers.polling import wait_until
from tests.servers.ports import network_address
from tests.servers.replica import record, served


class Application:
    """An ASGI application that counts its requests."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        await JSONResponse({})(scope, receive, send)

    @property
    def predictions(self) -> list[str]:
        return [path for path in self.paths if path.endswith(":predict")]


@pytest.fixture
def host() -> str:
    return network_address()


@pytest.fixture
def certificates(edge: Edge, host: str, tmp_path: Path) -> Path:
    """A folder with the certificate of a node of the edge's cluster."""
    write_node_certificate(tmp_path / "node", authority=Path(edge.places.tls), name="n", addresses=[host])
    return tmp_path / "node"


def targets(address: str) -> dict[str, tuple[str, ...]]:
    return {"m-v1": (address,), "m-v2": (address,), "outcomes": (address,), "features": (address,)}


def test_request_reaches_a_replica_over_the_network(whole: Edge, host: str, certificates: Path) -> None:
    """By TLS, also for health checks, and with the edge's secret, which the replica requires."""
    application = Application()
    with served(
        EdgeOnly(application, edge_proof(whole.places)), host=host, certificates=certificates
    ) as address:
        whole.load_targets(targets(address))
        wait_until(lambda: "/-/healthz" in application.paths)
        for unit in ("a", "b", "c", "d"):
            assert whole.call(token=whole.token(), headers={"x-unit-id": unit}) == (200, {})
        assert len(application.predictions) == 4


@pytest.mark.parametrize("certificate", ["of another authority", "of another node", "missing"])
def test_edge_sends_nothing_to_a_server_that_is_not_the_node(
    whole: Edge, host: str, tmp_path: Path, certificate: str
) -> None:
    """Neither a token nor the secret; the client gets 503."""
    application, folder = Application(), tmp_path / "wrong"
    if certificate == "of another authority":
        ensure_tls(Layout(str(tmp_path / "other")), addresses=[host])
        folder = tmp_path / "other" / "tls"
    else:
        write_node_certificate(folder, authority=Path(whole.places.tls), name="n", addresses=["10.9.9.9"])
    with served(application, host=host, certificates=None if certificate == "missing" else folder) as address:
        whole.load_targets(targets(address))
        assert whole.call(token=whole.token())[0] == 503
    assert application.paths == []


def request(address: str, path: str, headers: dict[str, str], authority: str) -> tuple[int, Any]:
    context = ssl.create_default_context(cafile=authority)
    connection = http.client.HTTPSConnection(address, context=context, timeout=10)
    connection.request("POST", path, b"{}", headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_client_that_passes_by_the_edge_is_refused(edge: Edge, host: str, certificates: Path) -> None:
    """Without the secret or with another one; health checks need none."""
    application, authority = Application(), f"{edge.places.tls}/ca.pem"
    proof = edge_proof(edge.places)
    with served(EdgeOnly(application, proof), host=host, certificates=certificates) as address:
        for headers in ({}, {PROOF: "guess"}, {PROOF: ""}, {PROOF: proof[:-1]}):
            status, content = request(address, "/m-v1/v1/models/m:predict", headers, authority)
            assert (status, content["code"]) == (403, 403)
            assert "edge" in content["error"]
        assert application.paths == []
        assert request(address, "/-/healthz", {}, authority)[0] == 200
        assert request(address, "/m-v1/v1/models/m:predict", {PROOF: proof}, authority)[0] == 200


def test_copies_for_a_shadow_use_tls(edge: Edge, host: str, certificates: Path, tmp_path: Path) -> None:
    """A server of another authority gets neither the copy nor the replica's token."""
    application = Application()
    ensure_tls(Layout(str(tmp_path / "other")), addresses=[host])
    with (
        served(application, host=host, certificates=certificates) as address,
        served(application, host=host, certificates=tmp_path / "other" / "tls") as other,
        contextlib.closing(Connections(f"{edge.places.tls}/ca.pem")) as connections,
    ):
        assert connections.post(address, "/x", b"", {}) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            connections.post(other, "/x", b"", {})
    assert application.paths == ["/x"]


@pytest.fixture
def node(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A node of a cluster with several nodes, in this process's environment."""
    places = Layout(str(tmp_path))
    ensure_tls(places, addresses=[host])
    written = asdict(replace(record(tmp_path, "", 1), address=host))
    (tmp_path / "cluster.json").write_text(json.dumps(written))
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "cluster.json"))
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", f"{places.tls}/node.pem")
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", f"{places.tls}/node.key")
    monkeypatch.setattr(listening, "own_address", lambda: host)
    # Undoes what a test replaces.
    monkeypatch.setattr(serve_replica, "start_asgi_http_server", http_util.start_asgi_http_server)
    return places


def test_servers_of_a_node_answer_only_its_edges(node: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster with one node, nothing is required."""
    kinds = [(each.cls, each.kwargs) for each in middlewares()]
    assert kinds == [(DirectAnswers, {}), (EdgeOnly, {"proof": edge_proof(node)})]
    monkeypatch.delenv(RECORD_VARIABLE)
    assert [each.cls for each in middlewares()] == [DirectAnswers]


def test_server_of_serve_listens_on_its_nodes_address(node: Layout, host: str) -> None:
    """The function with which a replica starts its server replaces the head's address and certificate by its node's."""
    listening.answer_on_own_address()
    options = HTTPOptions(host="10.9.9.9", port=0, middlewares=[])

    async def answer_of_server() -> tuple[str, bytes]:
        task, server = await serve_replica.start_asgi_http_server(
            Application(), options, event_loop=asyncio.get_running_loop()
        )
        while not server.started:
            await asyncio.sleep(0.01)
        bound, port = server.servers[0].sockets[0].getsockname()
        context = ssl.create_default_context(cafile=f"{node.tls}/ca.pem")
        reader, writer = await asyncio.open_connection(bound, port, ssl=context)
        writer.write(b"GET /x HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        server.should_exit = True
        await task
        return bound, answer

    bound, answer = asyncio.run(answer_of_server())
    assert bound == host
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_server_takes_a_renewed_certificate(node: Layout, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New connections get the new certificate, and open ones stay open. A certificate needs its own key."""
    listening.answer_on_own_address()
    monkeypatch.setattr(listening.follow_certificate, "__kwdefaults__", {"every_s": 0.02})
    options = HTTPOptions(host="10.9.9.9", port=0, middlewares=[])
    context = ssl.create_default_context(cafile=f"{node.tls}/ca.pem")

    async def serial_number(port: int) -> int:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(shown).serial_number

    def stored() -> int:
        return x509.load_pem_x509_certificate(Path(f"{node.tls}/node.pem").read_bytes()).serial_number

    async def wait_for(number: int, port: int) -> None:
        async with asyncio.timeout(10):
            while await serial_number(port) != number:
                await asyncio.sleep(0.01)

    async def renewed() -> None:
        task, server = await serve_replica.start_asgi_http_server(
            Application(), options, event_loop=asyncio.get_running_loop()
        )
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        first = stored()
        await wait_for(first, port)
        ensure_tls(node, addresses=[host], renew=True)
        second = stored()
        assert second != first
        await wait_for(second, port)
        Path(f"{node.tls}/node.pem").write_text("half a file")
        await asyncio.sleep(0.1)
        assert await serial_number(port) == second
        writer.write(b"GET /x HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        server.should_exit = True
        await task

    asyncio.run(renewed())


def test_without_its_record_a_node_serves_nothing(node: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not know the secret to require. On loopback, the options stay as they are."""
    loopback = HTTPOptions(host="127.0.0.1", port=1)
    assert listening.own_options(loopback, address="10.0.0.1") is loopback
    monkeypatch.setenv(RECORD_VARIABLE, f"{node.root}/missing.json")
    with pytest.raises(ConfigError, match=r"missing\.json"):
        listening.own_options(HTTPOptions(host="10.9.9.9", port=1), address="10.0.0.1")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", False), ("127.1.2.3:1", False), ("[::1]:1", False), ("10.0.0.7:1", True), ("h:1", True)],
)
def test_only_servers_on_loopback_speak_plain_http(address: str, expected: bool) -> None:
    assert uses_tls(address) is expected
