"""Which address an application has when it has no replica: asleep and failed are different things."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from serve_apps.edge.haproxy.config import render
from serve_apps.replica.targets import ScaledToZero, read_targets
from tests.edge import PREDICT, ROLLOUT, Echo, Edge, Mirror, treated_unit, wait_until

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
    """What Serve says of one application, as far as we read it."""
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
        ("::", "10.0.0.7"),
        ("127.0.0.1", "127.0.0.1"),
        ("10.1.0.7", "10.1.0.7"),
    ],
)
def test_a_running_replica_is_addressed_directly(host: str, expected: str) -> None:
    """Whatever else Serve says of its application; where replicas listen, which is where Serve's proxy does."""
    content = published(status="UNHEALTHY", minimum=None, host=host, ports=(REPLICA, REPLICA + 1))
    if not host:
        del content["http_options"]["host"]
    assert read_targets(content) == {"m-v1": (f"{expected}:30001", f"{expected}:30002")}


@pytest.mark.parametrize("deployment", ["HEALTHY", "UPSCALING", "DOWNSCALING"])
def test_asleep_is_reached_through_serves_proxy(deployment: str) -> None:
    """It may have no replica, and Serve finds nothing wrong: also while one starts, or the last leaves."""
    found = read_targets(published(deployment=deployment))
    assert found == {"m-v1": ScaledToZero(("127.0.0.1:8000",))}


@pytest.mark.parametrize(
    "said",
    [{"status": status} for status in ("UNHEALTHY", "DEPLOYING", "DEPLOY_FAILED", "DELETING", "NOT_STARTED")]
    + [{"deployment": "UNHEALTHY"}, {"minimum": 1}, {"minimum": None}],
)
def test_failed_is_not_reached_at_all(said: dict[str, Any]) -> None:
    """Serve names its proxy here too, but somebody else should answer at once."""
    assert read_targets(published(**said)) == {}


@pytest.mark.parametrize("group", [{"protocol": "gRPC"}, {"app_name": ""}, {"targets": []}])
def test_other_targets_are_left_out(group: dict[str, Any]) -> None:
    """Serve's own, those of other protocols, and groups without any."""
    assert read_targets(published(**group)) == {}


def test_a_controller_of_serve_that_has_just_come_back_takes_nobody_out() -> None:
    """It lists no addresses until it has found its replicas again, all of which go on answering."""
    with pytest.raises(ValueError, match="replicas of m-v1"):
        read_targets(published(replicas=("RECOVERING",), targets=[]))
    assert read_targets(published(replicas=("STARTING",), targets=[])) == {}


class Starting(Echo):
    """Answers when a replica would have started."""

    def do_POST(self) -> None:
        assert isinstance(self.server, SlowMirror)
        self.server.num_asked += 1
        self.server.asked.set()
        self.server.started.wait(10)
        super().do_POST()

    def do_GET(self) -> None:
        super().do_POST()


class SlowMirror(Mirror):
    """Serve's proxy, as far as the edge can tell."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Starting)
        self.asked, self.started = threading.Event(), threading.Event()
        self.num_asked = 0


@pytest.fixture
def waker(whole: Edge) -> Iterator[SlowMirror]:
    """The treatment is asleep, and takes its time."""
    server = SlowMirror()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fall_asleep(whole, server, patience_s=20)
    yield server
    server.started.set()
    server.shutdown()
    server.server_close()


def fall_asleep(edge: Edge, waker: SlowMirror, *, patience_s: float) -> None:
    targets = edge.targets | {"m-v2": ScaledToZero((f"127.0.0.1:{waker.server_address[1]}",))}
    settings = replace(edge.settings, wake_timeout_s=patience_s)
    edge.haproxy.load(render(edge.routes(ROLLOUT, targets), edge.keys, settings))


def test_a_request_waits_for_a_version_that_is_asleep(whole: Edge, waker: SlowMirror) -> None:
    """It is the treatment's, with all that the edge says of it; others do not wait with it."""
    headers: dict[str, str | bytes] = {"X-Unit-ID": treated_unit()}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(whole.call, token=whole.token(), headers=headers)
        assert waker.asked.wait(5)
        assert whole.call(token=whole.token())[1]["x-falaj-variant"] == "champion"
        assert not waiting.done()
        waker.started.set()
        status, heard = waiting.result(5)
    said = [heard.get(f"x-falaj-{name}") for name in ("variant", "arm", "rollout")]
    assert (status, said, heard["path"]) == (200, ["challenger", "treatment", "r1"], f"/m-v2{PREDICT}")
    assert {"x-falaj-request-id", "x-falaj-unit-hash", "authorization"} <= heard.keys()


def test_a_version_that_never_wakes_is_an_error_in_time(whole: Edge, waker: SlowMirror) -> None:
    """In JSON, and the edge does not ask twice."""
    fall_asleep(whole, waker, patience_s=0.3)
    status, content = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, content["code"]) == (503, 503)
    assert waker.num_asked == 1


class Leaving(Echo):
    """As a replica is that Serve takes away."""

    def do_GET(self) -> None:
        assert isinstance(self.server, LeavingMirror)
        self.server.checks += 1
        self.send_response(503)
        self.send_header("content-length", "8")
        self.end_headers()
        self.wfile.write(b"DRAINING")


class LeavingMirror(Mirror):
    """Counts the health checks."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Leaving)
        self.checks = 0


def test_a_replica_that_drains_is_asked_until_its_successor_is_known(whole: Edge) -> None:
    """It still answers, whatever its health checks say."""
    server = LeavingMirror()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    targets = whole.targets | {"m-v1": (f"127.0.0.1:{server.server_address[1]}",)}
    config = render(whole.routes(ROLLOUT, targets), whole.keys, whole.settings)
    whole.haproxy.load(config.replace("inter 500ms", "inter 50ms"))
    wait_until(lambda: server.checks > 5)
    assert whole.call(token=whole.token())[0] == 200
    server.shutdown()
    server.server_close()


def test_a_champion_that_is_asleep_is_ready(whole: Edge) -> None:
    """It will answer."""
    server = Mirror(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    targets = whole.targets | {"m-v1": ScaledToZero((f"127.0.0.1:{server.server_address[1]}",))}
    whole.haproxy.load(render(whole.routes(ROLLOUT, targets), whole.keys, whole.settings))
    assert whole.call("/v2/health/ready", method="GET")[0] == 200
    server.shutdown()
    server.server_close()
