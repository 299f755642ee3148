"""Requests for submitted jobs and rollouts through a real HAProxy, to servers at the services' sockets."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.security.tokens.roles import Role
from tests.servers.edge import Echo, Edge

JOB = "/v1/jobs/job-1"


class ClosingEcho(Echo):
    """Closes each connection, so that HAProxy keeps none to a server that has ended."""

    protocol_version = "HTTP/1.0"


class SocketEcho(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """An echo server at a socket."""

    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = super().get_request()
        return connection, ("", 0)


@pytest.fixture
def job_service(edge: Edge) -> Iterator[SocketEcho]:
    path = Path(edge.settings.jobs_socket)
    path.unlink(missing_ok=True)
    with SocketEcho(str(path), ClosingEcho) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
    path.unlink()


@pytest.fixture
def controller(edge: Edge) -> Iterator[SocketEcho]:
    """Run an echo server at the socket of the controller of rollouts."""
    path = Path(edge.settings.rollouts_socket)
    with SocketEcho(str(path), ClosingEcho) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
    path.unlink()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_controller_of_rollouts_gets_the_callers_token(
    edge: Edge, controller: SocketEcho, method: str
) -> None:
    """Of every role. A token that is limited to another model is refused by the edge."""
    for role in Role:
        token = edge.token(role)
        status, heard = edge.call("/v1/rollouts/m", method=method, token=token, headers={"cookie": "a=b"})
        assert (status, heard["path"], heard["authorization"]) == (200, "/v1/rollouts/m", f"Bearer {token}")
        assert "cookie" not in heard
    assert edge.call("/v1/rollouts/m", method=method)[0] == 401
    limited = edge.token(Role.admin, scope="model:other")
    assert edge.call("/v1/rollouts/m", method=method, token=limited)[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("DELETE", "/v1/rollouts/m", 405),
        ("HEAD", "/v1/rollouts/m", 405),
        ("GET", "/v1/rollouts/", 404),
        ("GET", "/v1/rollouts", 404),
        ("GET", "/v1/rollouts/m/x", 404),
    ],
)
def test_other_paths_and_methods_of_rollouts_are_refused(
    edge: Edge, controller: SocketEcho, method: str, path: str, status: int
) -> None:
    """The edge answers them itself."""
    if method == "HEAD":
        connection = edge.connect()
        connection.request(method, path, headers={"authorization": f"Bearer {edge.token()}"})
        assert connection.getresponse().status == status
        connection.close()
        return
    assert edge.call(path, method=method, token=edge.token())[0] == status


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs?limit=1"),
        ("GET", JOB),
        ("DELETE", JOB),
        ("GET", f"{JOB}/logs"),
    ],
)
def test_every_role_reaches_the_job_service(
    edge: Edge, job_service: SocketEcho, role: Role, method: str, path: str
) -> None:
    """The service decides and records it. It gets the caller's own token, and none of the edge's headers or cookies."""
    token = edge.token(role)
    headers: dict[str, str | bytes] = {"x-falaj-proof": "mine", "cookie": "a=b"}
    status, heard = edge.call(path, method=method, token=token, headers=headers)
    assert (status, heard["path"], heard["authorization"]) == (200, path, f"Bearer {token}")
    assert not {"cookie", "x-falaj-proof", "x-ray-authorization"} & heard.keys()


def test_unauthenticated_requests_and_other_tenants_do_not_reach_it(
    edge: Edge, job_service: SocketEcho
) -> None:
    """The edge answers them itself, with the status of every other path."""
    assert edge.call("/v1/jobs")[0] == 401
    assert edge.call("/v1/jobs", token=edge.token(Role.admin, tenant="other"))[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/v1/jobs", 405),
        ("DELETE", "/v1/jobs", 405),
        ("POST", JOB, 405),
        ("POST", f"{JOB}/logs", 405),
        ("GET", "/v1/jobs/", 404),
        ("GET", "/v1/jobs/../../ray/", 404),
        ("GET", "/v1/jobs/a/b", 404),
        ("GET", f"{JOB}%2flogs", 404),
        ("GET", f"/v1/jobs/{'x' * 65}", 404),
    ],
)
def test_other_paths_and_methods_are_refused(
    edge: Edge, job_service: SocketEcho, method: str, path: str, status: int
) -> None:
    """The answer is JSON."""
    assert edge.call(path, method=method, token=edge.token(Role.admin))[0] == status


class SlowLog(ClosingEcho):
    """Sends a log with a long pause."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/plain")
        self.end_headers()
        for line in (b"one\n", b"two\n"):
            self.wfile.write(line)
            self.wfile.flush()
            time.sleep(1.2 if line == b"one\n" else 0)


def test_silent_log_outlives_the_timeouts_of_other_requests(edge: Edge, job_service: SocketEcho) -> None:
    """A job may print nothing for long. The timeouts of client and server are shortened to half a second here."""
    job_service.RequestHandlerClass = SlowLog
    for setting in ("client 30s", "server 2m"):
        edge.load_targets(timeout=(f"timeout {setting}", f"timeout {setting.split()[0]} 500ms"))
        connection = edge.connect()
        connection.request("GET", f"{JOB}/logs", headers={"authorization": f"Bearer {edge.token()}"})
        assert connection.getresponse().read() == b"one\ntwo\n"
        connection.close()
    edge.load_targets()


def test_without_the_service_the_answer_is_503(edge: Edge) -> None:
    """It is JSON, too."""
    status, content = edge.call("/v1/jobs", token=edge.token(Role.admin))
    assert (status, content["code"]) == (503, 503)


@pytest.mark.parametrize("path", ["/v1/jobs", JOB, f"{JOB}/logs"])
def test_head_is_refused(edge: Edge, job_service: SocketEcho, path: str) -> None:
    """The answer to HEAD is over at once, but a followed log is not. The next request would wait for its end."""
    connection = edge.connect()
    connection.request("HEAD", path, headers={"authorization": f"Bearer {edge.token()}"})
    assert connection.getresponse().status == 405
    connection.close()
