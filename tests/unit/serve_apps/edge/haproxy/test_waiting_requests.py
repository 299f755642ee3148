"""A champion without a replica: Serve's proxy holds its requests until a replica is up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from serve_apps.edge.haproxy.config import render
from tests.servers.edge import PREDICT, ROLLOUT, Echo, Edge, Mirror, treated_unit
from tests.servers.ports import free_port


class HoldingEcho(Echo):
    """Answers a request when there is a replica, or answers that the application is unknown."""

    def do_POST(self) -> None:
        assert isinstance(self.server, HoldingProxy)
        self.server.got_request.set()
        self.server.may_answer.wait(10)
        if not self.server.unknown:
            super().do_POST()
            return
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(404)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", "14")
        self.end_headers()
        self.wfile.write(b"no application")

    do_GET = Echo.do_POST


class HoldingProxy(Mirror):
    """Serve's proxy, as far as the edge can tell."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HoldingEcho)
        self.got_request, self.may_answer = threading.Event(), threading.Event()
        self.unknown = False
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def serve_proxy(whole: Edge) -> Iterator[HoldingProxy]:
    server = HoldingProxy()
    yield server
    server.may_answer.set()
    server.shutdown()
    server.server_close()


def load(
    edge: Edge, serve_proxy: HoldingProxy, targets: dict[str, tuple[str, ...]], *, wake_timeout_s: float = 5
) -> None:
    address = f"127.0.0.1:{serve_proxy.server_address[1]}"
    settings = replace(edge.settings, serve_proxy=address, wake_timeout_s=wake_timeout_s)
    edge.haproxy.load(render(edge.routes(ROLLOUT, targets), edge.keys, settings))


@pytest.mark.parametrize("app", ["m-v1", "outcomes"])
@pytest.mark.parametrize("known", [True, False], ids=["killed just now", "known to be gone"])
def test_request_waits_until_a_replica_is_up(
    whole: Edge, serve_proxy: HoldingProxy, app: str, known: bool
) -> None:
    """As long as for a version that is scaled to zero; also for `features` and `outcomes`."""
    others = {name: target for name, target in whole.targets.items() if name != app}
    load(whole, serve_proxy, others | ({app: (f"127.0.0.1:{free_port()}",)} if known else {}))
    path = PREDICT if app == "m-v1" else "/v1/outcomes"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(whole.call, path, token=whole.token())
        assert serve_proxy.got_request.wait(5)
        assert not waiting.done()
        serve_proxy.may_answer.set()
        status, echo = waiting.result(5)
    assert (status, echo["path"]) == (200, f"/{app}{path}")
    if not known:
        assert whole.call("/v2/health/ready", method="GET")[0] == (503 if app == "m-v1" else 200)


def test_requests_with_a_replica_do_not_wait(whole: Edge, serve_proxy: HoldingProxy) -> None:
    """Nor do those of a treatment without one: its champion answers."""
    serve_proxy.may_answer.set()
    load(whole, serve_proxy, whole.targets | {"m-v2": (f"127.0.0.1:{free_port()}",)})
    assert whole.call(token=whole.token())[0] == 200
    status, echo = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, echo["x-falaj-variant"]) == (200, "champion")
    assert not serve_proxy.got_request.is_set()


def test_unknown_application_of_the_proxy_is_503_in_json(whole: Edge, serve_proxy: HoldingProxy) -> None:
    """The proxy's own answer is text, and names an internal application."""
    serve_proxy.unknown = True
    serve_proxy.may_answer.set()
    load(whole, serve_proxy, {name: target for name, target in whole.targets.items() if name != "m-v1"})
    status, content = whole.call(token=whole.token())
    assert (status, content["code"]) == (503, 503)


def test_request_that_waits_too_long_is_503(whole: Edge, serve_proxy: HoldingProxy) -> None:
    """In JSON."""
    targets = {name: target for name, target in whole.targets.items() if name != "m-v1"}
    load(whole, serve_proxy, targets, wake_timeout_s=0.3)
    status, content = whole.call(token=whole.token())
    assert (status, content["code"]) == (503, 503)
