"""A champion without a replica: its requests are held by Serve's proxy until there is one again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from serve_apps.edge.haproxy.config import render
from tests.edge import PREDICT, ROLLOUT, Echo, Edge, Mirror, treated_unit
from tests.ports import free_port


class Holding(Echo):
    """Answers a request when there is a replica, or says that it knows no such application."""

    def do_POST(self) -> None:
        assert isinstance(self.server, Holder)
        self.server.asked.set()
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


class Holder(Mirror):
    """Serve's proxy, as far as the edge can tell."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Holding)
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.unknown = False
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def holder(whole: Edge) -> Iterator[Holder]:
    server = Holder()
    yield server
    server.may_answer.set()
    server.shutdown()
    server.server_close()


def load(edge: Edge, holder: Holder, targets: dict[str, tuple[str, ...]]) -> None:
    settings = replace(edge.settings, holder=f"127.0.0.1:{holder.server_address[1]}", wake_timeout_s=5)
    edge.haproxy.load(render(edge.routes(ROLLOUT, targets), edge.keys, settings))


@pytest.mark.parametrize("app", ["m-v1", "outcomes"])
@pytest.mark.parametrize("known", [True, False], ids=["killed just now", "known to be gone"])
def test_a_request_is_held_until_there_is_a_replica(
    whole: Edge, holder: Holder, app: str, known: bool
) -> None:
    """As long as for a version that is asleep; of the applications that belong to no model, too."""
    others = {name: target for name, target in whole.targets.items() if name != app}
    load(whole, holder, others | ({app: (f"127.0.0.1:{free_port()}",)} if known else {}))
    path = PREDICT if app == "m-v1" else "/v1/outcomes"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(whole.call, path, token=whole.token())
        assert holder.asked.wait(5)
        assert not waiting.done()
        holder.may_answer.set()
        status, heard = waiting.result(5)
    assert (status, heard["path"]) == (200, f"/{app}{path}")
    if not known:
        assert whole.call("/v2/health/ready", method="GET")[0] == (503 if app == "m-v1" else 200)


def test_a_champion_with_a_replica_is_not_held(whole: Edge, holder: Holder) -> None:
    """Nor is a treatment without one: its champion answers."""
    holder.may_answer.set()
    load(whole, holder, whole.targets | {"m-v2": (f"127.0.0.1:{free_port()}",)})
    assert whole.call(token=whole.token())[0] == 200
    status, heard = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, heard["x-falaj-variant"]) == (200, "champion")
    assert not holder.asked.is_set()


def test_what_the_proxy_does_not_know_is_503_in_json(whole: Edge, holder: Holder) -> None:
    """Its own answer is text, and speaks of an application that the client has never heard of."""
    holder.unknown = True
    holder.may_answer.set()
    load(whole, holder, {name: target for name, target in whole.targets.items() if name != "m-v1"})
    status, content = whole.call(token=whole.token())
    assert (status, content["code"]) == (503, 503)


def test_a_request_that_is_held_for_too_long_is_503(whole: Edge, holder: Holder) -> None:
    """In JSON."""
    load(whole, holder, {name: target for name, target in whole.targets.items() if name != "m-v1"})
    settings = replace(whole.settings, holder=f"127.0.0.1:{holder.server_address[1]}", wake_timeout_s=0.3)
    targets = {name: target for name, target in whole.targets.items() if name != "m-v1"}
    whole.haproxy.load(render(whole.routes(ROLLOUT, targets), whole.keys, settings))
    status, content = whole.call(token=whole.token())
    assert (status, content["code"]) == (503, 503)
