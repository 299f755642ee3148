"""A replica that cannot answer a request sends it back to the edge, which asks another replica."""

from __future__ import annotations

import json
import uuid

from serve_apps.edge.haproxy import backends
from serve_apps.edge.haproxy.routes import Backend
from serve_apps.replica.http import ReplicaUnavailable, refusal
from serve_apps.replica.http_contract import TRY_ANOTHER
from tests.servers.edge import Echo, Edge, Mirror, treated_unit


class Full(Echo):
    """Answers as a replica whose disk is full."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        response = refusal(ReplicaUnavailable("The record cannot be written: no space left on device."))
        assert response.status_code == TRY_ANOTHER
        self.send_response(response.status_code)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(response.body)

    def do_GET(self) -> None:
        """Answer a health check: the replica is healthy."""
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()


def test_another_replica_answers(edge: Edge) -> None:
    """For the champion and for a treatment. The replica is healthy otherwise, so it gets requests."""
    with Mirror(Full) as full:
        good, other = edge.targets["m-v1"][0], edge.targets["m-v2"][0]
        try:
            edge.load_targets({"m-v1": (full.address, good), "m-v2": (full.address, other)})
            for unit in ("1", treated_unit()):
                for _ in range(6):
                    assert edge.call(token=edge.token(), headers={"x-unit-id": unit})[0] == 200
        finally:
            edge.load_targets()


def test_client_gets_503_if_no_replica_can_answer(edge: Edge) -> None:
    """The body has the replica's reason."""
    with Mirror(Full) as full:
        try:
            edge.load_targets({"m-v1": (full.address,)})
            status, content = edge.call(token=edge.token(), headers={"x-unit-id": uuid.uuid4().hex})
        finally:
            edge.load_targets()
    assert (status, content["code"]) == (503, 503)
    assert "no space left" in json.dumps(content)


def test_servers_on_other_machines_are_probed() -> None:
    """On loopback nothing can be cut off."""
    near, far = (
        backends.backend(Backend("m-v1", servers), serve_proxy="", wake_timeout_s=1.0)
        for servers in (("127.0.0.1:1", "127.0.0.1:2"), ("10.0.0.1:1", "10.0.0.2:1"))
    )
    assert ("tcp-ut" in near, "srvtcpka" in near) == (False, False)
    assert (far.count("tcp-ut 1500"), far.count("option srvtcpka")) == (2, 1)
