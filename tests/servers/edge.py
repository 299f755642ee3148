"""A running HAProxy with Falaj's configuration, a client of it, and a server behind it that echoes the requests."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cluster.security.edge_proof import edge_proof
from cluster.security.tls.certificates import ensure_tls
from cluster.security.tokens.issuer import AUDIENCE, ISSUER, ensure_issuer, mint_token, sign
from cluster.security.tokens.principal import local_keys
from cluster.security.tokens.roles import Role
from cluster.security.tokens.verification import TokenRules
from cluster.storage import Layout, write_bytes
from serve_apps.edge.control.haproxy_process import HAProxy
from serve_apps.edge.haproxy.answers import ERROR_STATUSES, error_file
from serve_apps.edge.haproxy.config import EdgeSettings, render
from serve_apps.edge.haproxy.dashboard import TOKEN_VARIABLE
from serve_apps.edge.haproxy.keys import JwtKey, key_writer
from serve_apps.edge.haproxy.request_limits import Limit, Limited, Limits
from serve_apps.edge.haproxy.routes import Routes, routes
from serve_apps.replica.edge_headers import edge_variables
from serve_apps.replica.targets import Target
from serve_apps.rollout.assignment import assign, bounds
from serve_apps.rollout.serving_state import ModelState, Rollout
from tests.servers.polling import wait_until
from tests.servers.ports import free_port

PREDICT = "/v1/models/m:predict"
SALT = "sé"
RAY_TOKEN = "token-of-ray"
ROLLOUT = Rollout(id="r1", salt=SALT, treatment_version=2, treatment_variant="challenger", weight=20)


def limits(*, folder: str, socket: str) -> Limits:
    """Return the default limits of an edge."""
    return Limits(
        principal=Limit(requests_per_s=10_000, concurrent=384),
        tenant=Limit(requests_per_s=50_000, concurrent=1_500),
        folder=folder,
        socket=socket,
    )


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the headers and the path of the request. It checks nothing, unlike a replica."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65_536  # send head and body together; otherwise the kernel delays the body by 40 ms

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        heard = {name.lower(): value for name, value in self.headers.items()} | {"path": self.path}
        body = json.dumps(heard).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-falaj-prediction-id", "p1")
        self.send_header("set-cookie", "ray-authentication-token=of-ray")  # like Ray's login
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class Mirror(http.server.ThreadingHTTPServer):
    """An echo server, by default on loopback, that runs during a `with` block."""

    def __init__(self, handler: type[Echo] = Echo, *, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), handler)

    def start(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about connections that HAProxy closed."""


def edge_settings(
    root: Path, sockets: Path, places: Layout, *, ports: tuple[int, int], dashboard: str
) -> EdgeSettings:
    """Return an edge's settings on loopback.

    Args:
        root: Folder for the edge's files.
        sockets: Folder for sockets. Its path must be short.
        places: Layout with the edge's certificate.
        ports: Ports of the edge and of its metrics.
        dashboard: Address of the server that replaces Ray's dashboard.
    """
    return EdgeSettings(
        bind=f"127.0.0.1:{ports[0]}",
        metrics_bind=f"127.0.0.1:{ports[1]}",
        certificate=f"{places.tls}/edge.pem",
        authority_folder=places.tls,
        dashboard=dashboard,
        jobs_socket=str(sockets / "jobs.sock"),
        rollouts_socket=str(sockets / "rollouts.sock"),
        tokens=TokenRules(issuer=ISSUER, audience=AUDIENCE),
        map_file=str(root / "routes.map"),
        error_folder=str(root / "errors"),
        admin_socket=str(sockets / "admin.sock"),
        limits=limits(folder=str(root), socket=str(sockets / "peers.sock")),
        max_body_bytes=100_000,
        threads=1,
        max_connections=2000,
        max_connections_of_one_address=500,
        wake_timeout_s=60.0,
        hang_ms=700,
    )


class Edge:
    """A running HAProxy, and methods that send requests to it."""

    def __init__(self, root: Path, socket_folder: Path) -> None:
        self.places = Layout(str(root))
        ensure_issuer(self.places)
        ensure_tls(self.places)
        self.servers = [Mirror().start() for _ in range(2)]
        self.port, metrics_port = free_port(), free_port()
        self.settings = edge_settings(
            root,
            socket_folder,
            self.places,
            ports=(self.port, metrics_port),
            dashboard=self.targets["m-v1"][0],
        )
        for status in ERROR_STATUSES:
            write_bytes(f"{self.settings.error_folder}/{status}.http", error_file(status).encode())
        for kind in Limited:
            write_bytes(str(self.settings.limits.file(kind)), b"")
        self.haproxy = HAProxy(
            config=root / "haproxy.cfg",
            admin_socket=Path(self.settings.admin_socket),
            access_folder=root / "access",
            secrets={TOKEN_VARIABLE: RAY_TOKEN} | edge_variables(edge_proof(self.places)),
        )
        self.keys = key_writer(local_keys(self.places), root / "keys")()
        self.context = ssl.create_default_context(cafile=self.ca_file)
        self.load(ROLLOUT)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> str:
        return f"{self.places.tls}/ca.pem"

    @property
    def targets(self) -> dict[str, tuple[str, ...]]:
        one, two = (server.address for server in self.servers)
        return {"m-v1": (one,), "m-v2": (two,), "outcomes": (one,), "features": (one,)}

    def routes(self, rollout: Rollout | None, targets: Mapping[str, Target] | None = None) -> Routes:
        states = {"m": ModelState(champion_version=1, apps={1: "m-v1", 2: "m-v2"}, rollout=rollout)}
        return routes(states, self.targets if targets is None else targets)

    def load_targets(
        self,
        targets: Mapping[str, Target] | None = None,
        *,
        keys: Sequence[JwtKey] | None = None,
        settings: EdgeSettings | None = None,
        timeout: tuple[str, str] = ("", ""),
    ) -> None:
        """Load the rollout with these targets. Keys, settings, or one text of a timeout can be replaced."""
        text = render(
            self.routes(ROLLOUT, targets), self.keys if keys is None else keys, settings or self.settings
        )
        assert timeout[0] in text
        self.haproxy.load(text.replace(*timeout))

    def load(self, rollout: Rollout | None) -> None:
        self.load_routes(self.routes(rollout))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                if self.call("/v2/health/ready", method="GET")[0] == 200:
                    return
            except OSError:
                threading.Event().wait(0.05)
        raise TimeoutError("HAProxy did not become ready")

    def load_routes(self, wanted: Routes) -> None:
        """Load routes, and write their splits to the map file."""
        entries = "".join(f"{name} {split}\n" for name, split in wanted.entries.items())
        write_bytes(self.settings.map_file, entries.encode())
        self.haproxy.load(render(wanted, self.keys, self.settings))

    def token(
        self,
        role: Role = Role.service,
        ttl_s: int = 900,
        tenant: str = "default",
        subject: str = "t",
        scope: str = "",
    ) -> str:
        return mint_token(
            self.places, subject=subject, role=role, purpose="test", ttl_s=ttl_s, tenant=tenant, scope=scope
        )

    def token_with(self, **claims: Any) -> str:
        """Return a token with a valid signature and any claims."""
        claims = {"sub": "t", "role": "admin", "purpose": ""} | claims
        return sign(self.places, claims, audience=AUDIENCE, token_type="JWT", ttl_s=60)

    def call(
        self,
        path: str = PREDICT,
        *,
        method: str = "POST",
        token: str | None = None,
        headers: dict[str, str | bytes] | None = None,
        body: bytes = b"{}",
        over: http.client.HTTPSConnection | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Send one request, over a new connection or over `over`. Return status and JSON."""
        connection = over or self.connect()
        connection.putrequest(method, path)
        given: dict[str, str | bytes] = {"content-length": str(len(body)), **(headers or {})}
        if token is not None:
            given["authorization"] = f"Bearer {token}"
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = json.loads(response.read())
        if over is None:
            connection.close()
        return response.status, content

    def ask(self, command: str) -> str:
        """Return the running worker's answer on its admin socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.settings.admin_socket)
            connection.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode()

    def logged(self, request_id: str) -> dict[str, Any]:
        """Wait for the access record of a request, and return it."""
        found: list[dict[str, Any]] = []

        def written() -> bool:
            found[:] = [record for record in self.records() if record["request_id"] == request_id]
            return bool(found)

        wait_until(written)
        return found[0]

    def records(self) -> list[dict[str, Any]]:
        """Return the access records that have been written."""
        files = sorted((Path(self.places.root) / "access").iterdir())
        lines = "".join(path.read_text(errors="replace") for path in files).splitlines()

        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=10)

    def send(self, data: bytes, *, timeout_s: float = 10) -> ssl.SSLSocket:
        """Send bytes that need not be HTTP, and return the open connection."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        connection = self.context.wrap_socket(plain, server_hostname="127.0.0.1")
        connection.sendall(data)
        return connection

    def exchange(self, data: bytes) -> tuple[int, bytes]:
        """Send bytes that need not be HTTP, and return status and body.

        The status is 0 if the connection ends without data.
        """
        received = b""
        with self.send(b"", timeout_s=5) as connection, contextlib.suppress(ConnectionError, ssl.SSLError):
            connection.sendall(data)
            while part := connection.recv(65_536):
                received += part
        if not received:
            return 0, b""
        head, _, body = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def close(self) -> None:
        self.haproxy.stop()
        for server in self.servers:
            server.stop()


def answer_of(connection: ssl.SSLSocket) -> tuple[int, bytes]:
    """Read an answer's status and body, and close the connection."""
    with connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


@contextlib.contextmanager
def running_edge(root: Path) -> Iterator[Edge]:
    """Run an edge. Its sockets are in a folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="falaj-edge-", dir="/tmp") as short:
        edge = Edge(root, Path(short))
        try:
            yield edge
        finally:
            edge.close()


def treated_unit() -> str:
    return next(str(n) for n in range(1000) if assign(SALT, str(n).encode(), bounds(20)) == "treatment")
