"""Addresses of an application without a replica: scaled to zero and failed are different."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from serve_apps.replica.targets import ScaledToZero, read_targets
from tests.servers.edge import PREDICT, Echo, Edge, Mirror, treated_unit
from tests.servers.polling import wait_until
from tests.servers.serve_proxy import HoldingProxy

PROXY, REPLICA = 8000, 30001


def published(
    *,
    status: str = "RUNNING",
    deployment: str = "HEALTHY",
    minimum: int | None = 0,
    host: str = "127.0.0.1",
    ports: tuple[int, ...] = (PROXY,),
    replicas: tuple[str, ...] = (),
    **group: Any,
) -> dict[str, Any]:
    """Build Serve's answer about one application, as far as we read it."""
    scaling = None if minimum is None else {"min_replicas": minimum, "max_replicas": 2}
    predictor = {
        "status": deployment,
        "deployment_config": {"autoscaling_config": scaling},
        "replicas": [{"state": state} for state in replicas],
    }
    targets = [{"ip": "10.0.0.7", "port": port, "name": "n"} for port in ports]
    return {
        "http_options": {"host": host, "port": PROXY},
        "applications": {"m-v1": {"status": status, "deployments": {"predictor": predictor}}},
        "target_groups": [{"app_name": "m-v1", "protocol": "HTTP", "targets": targets} | group],
    }


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("", "127.0.0.1"),
        ("0.0.0.0", "10.0.0.7"),  # noqa: S104
        ("127.0.0.1", "127.0.0.1"),
        ("10.1.0.7", "10.0.0.7"),
    ],
)
def test_running_replica_is_addressed_directly(host: str, expected: str) -> None:
    """Whatever the application's status; on its node, or on loopback if Serve listens there."""
    content = published(status="UNHEALTHY", minimum=None, host=host, ports=(REPLICA, REPLICA + 1))
    if not host:
        del content["http_options"]["host"]
    assert read_targets(content) == {"m-v1": (f"{expected}:30001", f"{expected}:30002")}


@pytest.mark.parametrize("deployment", ["HEALTHY", "UPSCALING", "DOWNSCALING"])
def test_application_scaled_to_zero_is_reached_through_the_proxy(deployment: str) -> None:
    """Such an application is healthy without a replica, also while a replica starts or the last one stops."""
    targets = read_targets(published(deployment=deployment))
    assert targets == {"m-v1": ScaledToZero(("127.0.0.1:8000",))}


@pytest.mark.parametrize(
    "failure",
    [{"status": status} for status in ("UNHEALTHY", "DEPLOYING", "DEPLOY_FAILED", "DELETING", "NOT_STARTED")]
    + [{"deployment": "UNHEALTHY"}, {"minimum": 1}, {"minimum": None}],
)
def test_failed_application_has_no_address(failure: dict[str, Any]) -> None:
    """Serve names its proxy here too, but the champion should answer at once."""
    assert read_targets(published(**failure)) == {}


@pytest.mark.parametrize("group", [{"protocol": "gRPC"}, {"app_name": ""}, {"targets": []}])
def test_other_targets_are_left_out(group: dict[str, Any]) -> None:
    """Serve's own, those of other protocols, and groups without targets."""
    assert read_targets(published(**group)) == {}


def test_restarted_serve_controller_removes_no_replica() -> None:
    """Serve lists no addresses until it has found its replicas again. Meanwhile, all replicas still answer."""
    with pytest.raises(ValueError, match="replicas of m-v1"):
        read_targets(published(replicas=("RECOVERING",), targets=[]))
    assert read_targets(published(replicas=("STARTING",), targets=[])) == {}


def scale_to_zero(edge: Edge, proxy: HoldingProxy, *, wake_timeout_s: float) -> None:
    """Load a treatment that is scaled to zero and starts slowly."""
    settings = replace(edge.settings, wake_timeout_s=wake_timeout_s)
    edge.load_targets(edge.targets | {"m-v2": ScaledToZero((proxy.address,))}, settings=settings)


def test_request_waits_for_a_version_scaled_to_zero(whole: Edge, serve_proxy: HoldingProxy) -> None:
    """The request gets the treatment's headers. Other requests do not wait."""
    scale_to_zero(whole, serve_proxy, wake_timeout_s=20)
    headers: dict[str, str | bytes] = {"X-Unit-ID": treated_unit()}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(whole.call, token=whole.token(), headers=headers)
        assert serve_proxy.got_request.wait(5)
        assert whole.call(token=whole.token())[1]["x-falaj-variant"] == "champion"
        assert not waiting.done()
        serve_proxy.may_answer.set()
        status, echo = waiting.result(5)
    values = [echo.get(f"x-falaj-{name}") for name in ("variant", "arm", "rollout")]
    assert (status, values, echo["path"]) == (200, ["challenger", "treatment", "r1"], f"/m-v2{PREDICT}")
    assert {"x-falaj-request-id", "x-falaj-unit-hash", "authorization"} <= echo.keys()


def test_version_that_never_starts_is_an_error_in_time(whole: Edge, serve_proxy: HoldingProxy) -> None:
    """The error is JSON, and the edge sends the request only once."""
    scale_to_zero(whole, serve_proxy, wake_timeout_s=0.3)
    status, content = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, content["code"]) == (503, 503)
    assert serve_proxy.num_requests == 1


class LeavingEcho(Echo):
    """Behaves as a replica that Serve stops, and counts its health checks."""

    checks = 0

    def do_GET(self) -> None:
        LeavingEcho.checks += 1
        self.send_response(503)
        self.send_header("content-length", "8")
        self.end_headers()
        self.wfile.write(b"DRAINING")


def test_draining_replica_gets_requests_until_its_successor_is_known(whole: Edge) -> None:
    """The replica still answers, although its health checks fail."""
    with Mirror(LeavingEcho) as replica:
        targets = whole.targets | {"m-v1": (replica.address,)}
        whole.load_targets(targets, timeout=("inter 500ms", "inter 50ms"))
        wait_until(lambda: LeavingEcho.checks > 5)
        assert whole.call(token=whole.token())[0] == 200


def test_champion_scaled_to_zero_is_ready(whole: Edge) -> None:
    """The champion will start a replica and answer."""
    with Mirror() as proxy:
        whole.load_targets(whole.targets | {"m-v1": ScaledToZero((proxy.address,))})
        assert whole.call("/v2/health/ready", method="GET")[0] == 200
