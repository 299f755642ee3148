"""The edge's configuration in a real HAProxy, in front of a server that says what reached it."""

from __future__ import annotations

import base64
import hmac
import http.client
import http.server
import json
import random
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from cluster.security.identity import ALGORITHM, AUDIENCE, ISSUER, ensure_issuer, mint_token
from cluster.security.policy import Role
from cluster.security.tls import ensure_tls
from cluster.storage import Layout, write_bytes
from serve_apps.edge.config import ERROR_STATUSES, EdgeSettings, error_file, render
from serve_apps.edge.haproxy import ConfigRefused, HAProxy
from serve_apps.edge.routes import Routes, routes
from serve_apps.rollout.assignment import assign, bounds
from serve_apps.rollout.state import ModelState, Rollout
from tests.ports import free_port

PREDICT = "/v1/models/m:predict"
SALT = "sé"
ROLLOUT = Rollout(id="r1", salt=SALT, treatment_version=2, treatment_variant="challenger", weight=20)


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the headers and the path it got; no double of a replica, only a mirror."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        heard = {name.lower(): value for name, value in self.headers.items()} | {"path": self.path}
        body = json.dumps(heard).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-falaj-prediction-id", "p1")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Mirror(http.server.ThreadingHTTPServer):
    """Serves echoes."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that HAProxy gave up."""


class Edge:
    """A running HAProxy and a client of it."""

    def __init__(self, root: Path, socket_folder: Path) -> None:
        self.places = Layout(str(root))
        ensure_issuer(self.places)
        ensure_tls(self.places)
        self.servers = [Mirror(("127.0.0.1", 0), Echo) for _ in range(2)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.port, metrics_port = free_port(), free_port()
        self.settings = EdgeSettings(
            bind=f"127.0.0.1:{self.port}",
            metrics_bind=f"127.0.0.1:{metrics_port}",
            certificate=f"{self.places.tls}/edge.pem",
            jwt_public_key=f"{self.places.keys}/issuer.pub.pem",
            map_file=str(root / "routes.map"),
            error_folder=str(root / "errors"),
            admin_socket=str(socket_folder / "admin.sock"),
            max_body_bytes=100_000,
        )
        for status in ERROR_STATUSES:
            write_bytes(f"{self.settings.error_folder}/{status}.http", error_file(status).encode())
        self.haproxy = HAProxy(
            config=root / "haproxy.cfg",
            admin_socket=Path(self.settings.admin_socket),
            access_folder=root / "access",
        )
        self.context = ssl.create_default_context(cafile=f"{self.places.tls}/ca.pem")
        self.load(ROLLOUT)

    @property
    def targets(self) -> dict[str, tuple[str, ...]]:
        one, two = (f"127.0.0.1:{server.server_address[1]}" for server in self.servers)
        return {"m-v1": (one,), "m-v2": (two,), "outcomes": (one,)}

    def routes(self, rollout: Rollout | None, targets: dict[str, tuple[str, ...]] | None = None) -> Routes:
        states = {"m": ModelState(champion_version=1, apps={1: "m-v1", 2: "m-v2"}, rollout=rollout)}
        return routes(states, self.targets if targets is None else targets)

    def load_targets(self, targets: dict[str, tuple[str, ...]]) -> None:
        self.haproxy.load(render(self.routes(ROLLOUT, targets), self.settings))

    def load(self, rollout: Rollout | None) -> None:
        wanted = self.routes(rollout)
        write_bytes(self.settings.map_file, "".join(f"{k} {v}\n" for k, v in wanted.entries.items()).encode())
        self.haproxy.load(render(wanted, self.settings))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if self.call("/v2/health/ready", method="GET")[0] == 200:
                    return
            except OSError:
                threading.Event().wait(0.05)
        raise TimeoutError("HAProxy did not become ready")

    def token(self, role: Role = Role.service, ttl_s: int = 900) -> str:
        return mint_token(self.places, subject="t", role=role, purpose="test", ttl_s=ttl_s)

    def call(
        self,
        path: str = PREDICT,
        *,
        method: str = "POST",
        token: str | None = None,
        headers: dict[str, str | bytes] | None = None,
        body: bytes = b"{}",
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=10)
        connection.putrequest(method, path)
        given: dict[str, str | bytes] = {"content-length": str(len(body)), **(headers or {})}
        if token is not None:
            given["authorization"] = f"Bearer {token}"
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        return response.status, content

    def close(self) -> None:
        self.haproxy.stop()
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    short = Path("/tmp") / f"falaj-edge-{random.randrange(10**9)}"
    short.mkdir(mode=0o700)
    running = Edge(tmp_path_factory.mktemp("edge"), short)
    yield running
    running.close()
    shutil.rmtree(short)


def forged(edge: Edge, key: Any, *, alg: str = ALGORITHM, kid: str = "k", **changes: Any) -> str:
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "t",
        "role": "service",
        "exp": now + 60,
        "nbf": now,
    } | changes
    return jwt.encode(
        {"alg": alg, "kid": kid}, {k: v for k, v in claims.items() if v is not None}, key, algorithms=[alg]
    )


def treated_unit() -> str:
    return next(str(n) for n in range(1000) if assign(SALT, str(n).encode(), bounds(20)) == "treatment")


def wait_until(said: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not said():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.05)


def confused(edge: Edge, public_key: bytes) -> str:
    """A token signed with HS256, the issuer's public key its secret."""
    claims = edge.token().split(".")[1]
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=").decode()
    mac = hmac.new(public_key, f"{head}.{claims}".encode(), "sha256").digest()
    return f"{head}.{claims}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def test_the_edge_and_python_assign_the_same_arm(edge: Edge) -> None:
    """For units of any bytes a header can hold."""
    token, limits = edge.token(), bounds(20)
    draw = random.Random(7)
    letters = [*range(33, 127), *range(128, 256)]
    units = [bytes(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(150)] + [b"a,b", b"x y", b"0"]
    heard = [edge.call(token=token, headers={"X-Unit-ID": unit})[1]["x-falaj-arm"] for unit in units]
    assert heard == [assign(SALT, unit, limits).value for unit in units]


@pytest.mark.parametrize("headers", [{}, {"X-Unit-ID": ""}])
def test_no_unit_meets_the_champion_outside_any_arm(edge: Edge, headers: dict[str, str | bytes]) -> None:
    """An empty header counts as none."""
    status, heard = edge.call(token=edge.token(), headers=headers)
    assert (status, heard["x-falaj-arm"], heard["x-falaj-variant"]) == (200, "none", "champion")


def test_a_clients_internal_headers_are_dropped(edge: Edge) -> None:
    """Nobody can choose a variant, an arm or an id from outside."""
    sent = {"x-falaj-variant": "challenger", "X-Falaj-Evil": "1", "x-falaj-request-id": "mine"}
    _, heard = edge.call(token=edge.token(), headers=sent)
    assert "x-falaj-evil" not in heard
    assert heard["x-falaj-variant"] == "champion"
    assert heard["x-falaj-request-id"] != "mine"
    assert heard["path"] == f"/m-v1{PREDICT}"


@pytest.mark.parametrize(
    ("role", "path", "status"),
    [
        (Role.service, PREDICT, 200),
        (Role.auditor, PREDICT, 403),
        (Role.data_scientist, "/v1/outcomes", 403),
        (Role.service, "/v1/outcomes", 200),
        (Role.service, "/v1/models/other:predict", 404),
        (Role.service, "/elsewhere", 404),
        (Role.service, "/v1/models/../m:predict", 404),
    ],
)
def test_role_and_path_decide(edge: Edge, role: Role, path: str, status: int) -> None:
    """Each refusal is JSON with its code."""
    answered, content = edge.call(path, token=edge.token(role))
    assert answered == status
    assert status == 200 or content["code"] == status


def test_tokens_that_must_not_pass(edge: Edge) -> None:
    """Missing, expired, not yet valid, without expiry, of another issuer, audience, key or algorithm."""
    other = ECKey.generate_key("P-256")
    real = ECKey.import_key((Path(edge.places.keys) / "issuer.pem").read_bytes())
    public = (Path(edge.places.keys) / "issuer.pub.pem").read_bytes()
    now = int(time.time())
    tokens = [
        None,
        "",
        "a.b.c",
        edge.token(ttl_s=-5),
        forged(edge, other),
        forged(edge, real, nbf=now + 600),
        forged(edge, real, exp=None),
        forged(edge, real, iss="elsewhere"),
        forged(edge, real, aud="elsewhere"),
        confused(edge, public),
        f"{edge.token().rsplit('.', 1)[0]}.",
    ]
    assert [edge.call(token=token)[0] for token in tokens] == [401] * len(tokens)
    assert edge.call(token=forged(edge, real))[0] == 200


def test_a_wrong_method_is_405(edge: Edge) -> None:
    """In JSON."""
    assert edge.call(method="GET", token=edge.token())[1]["code"] == 405


def test_a_changed_map_entry_takes_effect_without_a_reload(edge: Edge) -> None:
    """A rollback is one `set map`; a later reload finds it in the file."""
    headers: dict[str, str | bytes] = {"X-Unit-ID": treated_unit()}
    assert edge.call(token=edge.token(), headers=headers)[1]["x-falaj-variant"] == "challenger"
    back = edge.routes(None).entries["m"]
    edge.haproxy.set_map(Path(edge.settings.map_file), "m", back)
    assert edge.call(token=edge.token(), headers=headers)[1]["x-falaj-variant"] == "champion"
    edge.load(ROLLOUT)


def test_every_request_leaves_one_record_without_the_unit(edge: Edge) -> None:
    """JSON lines; the unit only as a hash."""
    token = edge.token()
    marks = [f"unit-{n}-é" for n in range(5)]
    ids = [
        edge.call(token=token, headers={"X-Unit-ID": mark.encode()})[1]["x-falaj-request-id"]
        for mark in marks
    ]
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        text = "".join(
            path.read_text(errors="replace") for path in (Path(edge.places.root) / "access").iterdir()
        )
        # HAProxy's own notices at a reload stand among the records.
        records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if {record["request_id"] for record in records} >= set(ids):
            break
        threading.Event().wait(0.05)
    mine = [record for record in records if record["request_id"] in ids]
    assert len(mine) == 5
    assert all(record["status"] == 200 and record["prediction_id"] == "p1" for record in mine)
    assert "unit-" not in text


def test_a_configuration_that_haproxy_refuses_is_never_loaded(edge: Edge) -> None:
    """The running one goes on."""
    with pytest.raises(ConfigRefused):
        edge.haproxy.load("frontend broken\n    bind nowhere\n    nonsense\n")
    assert edge.call(token=edge.token())[0] == 200


@pytest.fixture
def whole(edge: Edge) -> Iterator[Edge]:
    """The edge, with all its replicas again after the test."""
    yield edge
    edge.load(ROLLOUT)


@pytest.mark.parametrize("lost", ["dead", "absent"])
def test_a_treatment_without_a_replica_falls_back_to_the_champion(whole: Edge, lost: str) -> None:
    """The unit keeps its arm, so that a crashing variant cannot hide its evidence."""
    targets = whole.targets | {"m-v2": (f"127.0.0.1:{free_port()}",)}
    if lost == "absent":
        del targets["m-v2"]
    whole.load_targets(targets)
    token = whole.token()

    def answer() -> tuple[int, Any, Any]:
        status, heard = whole.call(token=token, headers={"X-Unit-ID": treated_unit()})
        return status, heard.get("x-falaj-variant"), heard.get("x-falaj-arm")

    wait_until(lambda: answer() == (200, "champion", "treatment"))


def test_a_champion_without_a_replica_is_503_and_not_ready(whole: Edge) -> None:
    """Treated units are still answered; the edge itself lives."""
    whole.load_targets(whole.targets | {"m-v1": (f"127.0.0.1:{free_port()}",)})
    wait_until(lambda: whole.call("/v2/health/ready", method="GET")[0] == 503)
    assert whole.call(token=whole.token())[1]["code"] == 503
    assert whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})[0] == 200
    assert whole.call("/v2/health/live", method="GET")[0] == 200


def test_a_change_right_after_a_reload_is_not_lost(whole: Edge) -> None:
    """`load` returns when the new worker serves, so `set map` cannot go to the old one only."""
    for _ in range(5):
        before = admin(whole, "show info")["Pid"]
        whole.load(ROLLOUT)
        whole.load_targets(whole.targets)
        whole.haproxy.set_map(Path(whole.settings.map_file), "m", whole.routes(None).entries["m"])
        wait_until(lambda old=before: admin(whole, "show info")["Pid"] != old)  # type: ignore[misc]
        _, heard = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
        assert heard["x-falaj-variant"] == "champion"


def admin(edge: Edge, command: str) -> dict[str, str]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(edge.settings.admin_socket)
        connection.sendall(command.encode() + b"\n")
        text = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def test_an_open_connection_outlives_a_reload_and_hears_of_a_rollback(whole: Edge) -> None:
    """A client that keeps its connection gets no reset, and the draining worker has the new split too."""
    headers = {"authorization": f"Bearer {whole.token()}", "X-Unit-ID": treated_unit()}
    connection = http.client.HTTPSConnection("127.0.0.1", whole.port, context=whole.context, timeout=10)
    connection.request("POST", PREDICT, b"{}", headers)
    assert json.loads(connection.getresponse().read())["x-falaj-variant"] == "challenger"
    kept = connection.sock
    whole.load_targets(whole.targets)
    whole.haproxy.set_map(Path(whole.settings.map_file), "m", whole.routes(None).entries["m"])
    assert connection.sock is kept
    connection.request("POST", PREDICT, b"{}", headers)
    assert json.loads(connection.getresponse().read())["x-falaj-variant"] == "champion"
    connection.close()
