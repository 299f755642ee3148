"""Tests that the cluster's token is sent only to the cluster's own processes."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from cluster.host.port_owner import NotOurServer, listener_uid, open_own, require_own_peer
from tests.processes.other_user import needs_root, start_as_nobody
from tests.servers.ports import free_port

LISTENER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listens", flush=True)
connection, _ = server.accept()
print(connection.recv(1000).decode(), flush=True)
"""


@pytest.fixture
def own_port() -> Iterator[int]:
    """Return the port of a server in this process."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def send_token(port: int) -> int:
    """Send a request with a token; return the status of the response."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Authorization": "Bearer canary"})
    with open_own(request, owner=os.geteuid(), timeout_s=5) as response:
        return int(response.status)


def test_own_server_gets_the_request(own_port: int) -> None:
    assert send_token(own_port) == 200


@needs_root
def test_another_users_server_gets_no_token() -> None:
    """The connection is made, but nothing is sent. This happens when Ray's dashboard died and another user took its
    port."""
    port = free_port()
    with start_as_nobody(LISTENER, str(port)) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listens\n"
        with pytest.raises(NotOurServer, match=r"user 65534 .*no token was sent"):
            send_token(port)
        assert other.stdout.readline() == "\n"


def test_port_without_a_listener_is_refused() -> None:
    """The server closed after the connection was made."""
    server = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(server.getsockname()) as connection, server.accept()[0]:
        require_own_peer(connection, owner=os.geteuid())
        server.close()
        with pytest.raises(NotOurServer, match="no process listens"):
            require_own_peer(connection, owner=os.geteuid())


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")])
def test_kernel_reports_the_listeners_user(family: socket.AddressFamily, address: str) -> None:
    """A socket that listens on every address is found too, as for Ray's gRPC servers."""
    with socket.create_server(
        (address, 0), family=family, dualstack_ipv6=family is socket.AF_INET6
    ) as server:
        assert listener_uid("127.0.0.1", server.getsockname()[1]) == os.geteuid()
