"""A champion without a replica: Serve's proxy holds its requests until a replica is up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.servers.edge import PREDICT, Edge, treated_unit
from tests.servers.ports import free_port
from tests.servers.serve_proxy import HoldingProxy


def load(
    edge: Edge, serve_proxy: HoldingProxy, targets: dict[str, tuple[str, ...]], *, wake_timeout_s: float = 5
) -> None:
    settings = replace(edge.settings, serve_proxy=serve_proxy.address, wake_timeout_s=wake_timeout_s)
    edge.load_targets(targets, settings=settings)


@pytest.mark.parametrize("app", ["m-v1", "outcomes"])
@pytest.mark.parametrize("known", [True, False], ids=["killed just now", "known to be gone"])
def test_request_waits_until_a_replica_is_up(
    whole: Edge, serve_proxy: HoldingProxy, app: str, known: bool
) -> None:
    """It waits as long as for a version that is scaled to zero. `features` and `outcomes` behave in the same way."""
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
    """Requests of a treatment without a replica do not wait, either, because the champion answers."""
    serve_proxy.may_answer.set()
    load(whole, serve_proxy, whole.targets | {"m-v2": (f"127.0.0.1:{free_port()}",)})
    assert whole.call(token=whole.token())[0] == 200
    status, echo = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, echo["x-falaj-variant"]) == (200, "champion")
    assert not serve_proxy.got_request.is_set()


@pytest.mark.parametrize("unknown", [True, False], ids=["unknown application", "no replica in time"])
def test_request_that_the_proxy_does_not_serve_is_503_in_json(
    whole: Edge, serve_proxy: HoldingProxy, unknown: bool
) -> None:
    """The proxy's own answer is text, and names an internal application."""
    serve_proxy.unknown = unknown
    if unknown:
        serve_proxy.may_answer.set()
    targets = {name: target for name, target in whole.targets.items() if name != "m-v1"}
    load(whole, serve_proxy, targets, wake_timeout_s=5 if unknown else 0.3)
    status, content = whole.call(token=whole.token())
    assert (status, content["code"]) == (503, 503)
