"""The edge's headers count only with the installation's proof."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.errors import ConfigError
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.edge_proof import edge_proof
from cluster.storage import Layout
from serve_apps.replica.edge_headers import PROOF, UNPROVED, EdgeHeaderReader, EdgeHeaders
from tests.servers.edge import PREDICT, Edge, running_edge
from tests.servers.replica import Replica, running_replica

SIGNATURE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="age", dtype="double"),), label="y")
BODY = b'{"entities": [{"id": 1}], "features": {"age": 3}}'
FORGED = {
    "x-falaj-request-id": "mine",
    "x-falaj-variant": "../zz",
    "x-falaj-arm": "shadow",
    "x-falaj-rollout": "r9",
    "x-falaj-unit-hash": "u9",
}


@pytest.fixture(scope="module")
def edge_and_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Edge, Replica]]:
    """A real edge in front of a real replica."""
    root = tmp_path_factory.mktemp("edge_and_replica")
    with running_edge(root) as edge, running_replica(root, SIGNATURE) as replica:
        edge.load_targets(edge.targets | {"m-v1": (replica.address,)})
        yield edge, replica


def raw(port: int, content: bytes, *, tls: ssl.SSLContext | None = None) -> tuple[int, Any]:
    """Send bytes, and return the answer's status and JSON."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        connection = tls.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain
        connection.sendall(content)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        if tls:
            connection.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def request(path: str, headers: dict[str, str], body: bytes = b"", *, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def with_trailers(headers: dict[str, str], trailers: dict[str, str], *, prefix: str = "") -> bytes:
    """A prediction whose body is followed by trailers."""
    chunk = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n"
    fields = "".join(f"{name}: {value}\r\n" for name, value in trailers.items()).encode()
    return request(
        prefix + PREDICT,
        headers | {"transfer-encoding": "chunked", "trailer": ", ".join(trailers), "connection": "close"},
        chunk + fields + b"\r\n",
    )


def last_record(replica: Replica, prediction_id: str) -> dict[str, Any]:
    log = replica.log()
    return log.filter(pl.col("prediction_id") == prediction_id).to_dicts()[0]


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def test_trailers_are_ignored(edge_and_replica: tuple[Edge, Replica]) -> None:
    """Through the edge and past it: no field of the log is the client's, and a valid request stays valid."""
    edge, replica = edge_and_replica
    trailers = FORGED | {
        "content-encoding": "gzip",
        "inference-header-content-length": "1",
        PROOF: edge_proof(replica.places),
    }
    headers = {"authorization": f"Bearer {edge.token()}"}
    status, answer = raw(edge.port, with_trailers(headers, trailers), tls=edge.context)
    assert (status, answer["variant"]) == (200, "champion")
    record = last_record(replica, answer["prediction_id"])
    assert (record["variant"], record["arm"], record["rollout"], record["unit_hash"]) == (
        ("champion", "none", "r1", "")
    )
    assert record["request_id"] not in ("", "mine")
    direct = with_trailers(headers, trailers, prefix=replica.prefix)
    status, answer = raw(port_of(replica.address), direct)
    assert (status, answer["variant"]) == (200, "champion")
    record = last_record(replica, answer["prediction_id"])
    assert (record["variant"], record["arm"], record["rollout"]) == ("champion", "none", "")


@pytest.mark.parametrize("proof", [{}, {PROOF: ""}, {PROOF: "0" * 64}, {PROOF: "\xff"}])
def test_headers_without_the_proof_are_ignored(
    edge_and_replica: tuple[Edge, Replica], proof: dict[str, str]
) -> None:
    """A client of a replica's own port cannot hide an answer from monitoring or name a variant."""
    _, replica = edge_and_replica
    status, answer = replica.json(PREDICT, BODY, headers=FORGED | proof)
    assert (status, answer["variant"]) == (200, "champion")
    record = last_record(replica, answer["prediction_id"])
    values = {name: record[name] for name in ("request_id", "variant", "arm", "rollout", "unit_hash")}
    assert EdgeHeaders(**values) == UNPROVED


def test_headers_with_the_proof_are_logged(edge_and_replica: tuple[Edge, Replica]) -> None:
    """Each field."""
    _, replica = edge_and_replica
    values = {
        "request_id": "q",
        "variant": "challenger",
        "arm": "treatment",
        "rollout": "r",
        "unit_hash": "u",
    }
    _, answer = replica.json(PREDICT, BODY, headers=replica.as_edge(**values))
    assert answer["variant"] == "challenger"
    assert values.items() <= last_record(replica, answer["prediction_id"]).items()


def test_edge_sends_its_proof_on_every_path(edge_and_replica: tuple[Edge, Replica]) -> None:
    """This is true even if a client sends another proof."""
    edge, replica = edge_and_replica
    proof = edge_proof(replica.places)
    for path in ("/v1/outcomes", "/v1/features:read"):
        _, echo = edge.call(path, token=edge.token(), headers={PROOF: "mine"})
        assert echo[PROOF] == proof
        assert {"x-falaj-rollout", "x-falaj-unit-hash", "x-falaj-arm", "x-falaj-variant"} <= echo.keys()
    assert proof not in (Path(edge.places.root) / "haproxy.cfg").read_text()


def test_upgrade_is_ignored(edge_and_replica: tuple[Edge, Replica]) -> None:
    """The request gets a normal answer, and hop-by-hop headers are dropped."""
    edge, replica = edge_and_replica
    upgrade = {
        "connection": "Upgrade, close",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        "authorization": f"Bearer {edge.token()}",
    }
    metadata = request("/v2/models/m", upgrade, method="GET")
    assert raw(edge.port, metadata, tls=edge.context)[0] == 200
    assert raw(edge.port, request("/v2/models/m", upgrade), tls=edge.context)[0] == 405
    direct = request(f"{replica.prefix}/v2/models/m", upgrade, method="GET")
    assert raw(port_of(replica.address), direct)[0] == 200
    _, echo = edge.call(
        "/v1/outcomes",
        token=edge.token(),
        headers={
            "connection": "upgrade",
            "upgrade": "h2c",
            "http2-settings": "AAMAAABkAAQAAP__",
            "te": "trailers",
        },
    )
    assert echo.keys().isdisjoint({"upgrade", "connection", "http2-settings", "te"})


def test_proof_is_one_private_file(tmp_path: Path) -> None:
    """The first caller creates it, it survives restarts, and it is refused if other users can read it."""
    places = Layout(str(tmp_path))
    proof = edge_proof(places)
    assert len(proof) == 64
    assert edge_proof(places) == proof
    [file] = list((tmp_path / "keys").iterdir())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    os.chmod(file, 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        edge_proof(places)


def test_first_of_repeated_headers_counts() -> None:
    """A later one is not the edge's."""
    read = EdgeHeaderReader("p").read
    assert (
        read([(b"x-falaj-proof", b"p"), (b"x-falaj-arm", b"control"), (b"x-falaj-arm", b"shadow")]).arm
        == "control"
    )
    assert (
        read([(b"x-falaj-proof", b"q"), (b"x-falaj-proof", b"p"), (b"x-falaj-arm", b"control")]) == UNPROVED
    )


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    """With it, every request would be from the edge. A full disk could leave an empty file."""
    places = Layout(str(tmp_path))
    edge_proof(places)
    (tmp_path / "keys" / "edge_proof").write_text("")
    with pytest.raises(ConfigError, match="edge_proof is empty"):
        edge_proof(places)
