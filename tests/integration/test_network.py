"""A cluster at a network address, with its ledger on PostgreSQL and a second edge.

Every port that another machine reaches is protected, and a command ends when both edges have its change.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import open_ledger
from cluster.security.edge_proof import edge_proof
from cluster.settings import LedgerConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout
from serve_apps.replica.edge_headers import PROOF
from serve_apps.replica.targets import serve_targets
from tests.integration.conftest import Project, new_project
from tests.projects import loan
from tests.servers.controller import Running, new_controller
from tests.servers.polling import wait_until
from tests.servers.ports import network_address
from tests.servers.postgresql import running_server

EDGE_NAME = "edge.example"


@dataclass(frozen=True, kw_only=True)
class NetworkProject(Project):
    """A project whose commands all need the address of its ledger."""

    ledger_url: str
    host: str

    @property
    def config(self) -> PlatformConfig:
        return PlatformConfig(
            storage=StorageConfig(root=str(self.storage_root)), ledger=LedgerConfig(url=self.ledger_url)
        )

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `cluster.up`."""
        names = f"cluster.edge_names=[{EDGE_NAME}]"
        return f"cluster.address={self.host}", names, f"ledger.url={self.ledger_url}"

    def run(self, module: str, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return super().run(module, *args, f"ledger.url={self.ledger_url}", **more)

    def split(self) -> str:
        """Return the model's map entry in the cluster's own edge."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{self.record.runtime_folder}/edge.sock")
            connection.sendall(f"show map {self.storage_root}/edge/routes.map\n".encode())
            shown = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        return shown.split()[-1]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkProject]:
    """A cluster at an address of this machine, with two versions of model `loan`; the first one is deployed."""
    host = network_address()
    with running_server() as url:
        base = new_project(tmp_path_factory.mktemp("network"))
        project = NetworkProject(root=base.root, ports=base.ports, env=base.env, ledger_url=url, host=host)
        project.up(*project.options)
        try:
            loan.prepare(project)
            project.run("jobs.train", *loan.TRAIN, check=True)
            yield project
        finally:
            project.run("cluster.down")


@pytest.fixture
def second(network: NetworkProject, tmp_path: Path) -> Iterator[Running]:
    """A second edge of the cluster, with files of its own."""
    with ExitStack() as stack:
        ledger = open_ledger(network.config)
        places = Layout(str(network.storage_root))
        edge = stack.enter_context(new_controller(tmp_path / "edge", ledger=ledger, places=places))
        edge.begin(fetch_targets=serve_targets(network.record))
        edge.thread.start()
        wait_until(lambda: edge.applied >= ledger.head() and "loan-v1" in edge.backends, seconds=30)
        yield edge


def context(project: Project) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(project.storage_root / "tls" / "ca.pem"))


def predict(project: Project, host: str, port: int) -> tuple[int, dict[str, Any]]:
    """Send a request for a prediction to an edge at an address."""
    connection = http.client.HTTPSConnection(host, port, context=context(project), timeout=30)
    body = json.dumps({"entities": [{"customer_id": 3}], "as_of": loan.AS_OF})
    headers = {"Authorization": f"Bearer {project.token()}", "X-Unit-ID": "3"}
    connection.request("POST", loan.PREDICT, body, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_edge_answers_at_the_address_and_its_certificate_has_the_names(network: NetworkProject) -> None:
    """Clients on other machines verify the address or the configured name; loopback answers as well."""
    port = network.ports["edge"]
    for host in (network.host, "127.0.0.1"):
        status, content = predict(network, host, port)
        assert (status, content["variant"]) == (200, "champion")
    with (
        socket.create_connection((network.host, port), timeout=10) as plain,
        context(network).wrap_socket(plain, server_hostname=EDGE_NAME) as connection,
    ):
        assert connection.version() == "TLSv1.3"


def test_replicas_and_serves_proxy_require_tls_and_the_edges_secret(network: NetworkProject) -> None:
    """They listen on the node's address only. A client with a valid token, but without the secret, is refused."""
    (replica,) = serve_targets(network.record)()["loan-v1"]  # type: ignore[misc]
    host, port = replica.split(":")
    assert host == network.host
    listeners = network.listeners()
    assert (listeners[int(port)], listeners[network.ports["serve_http"]]) == (network.host, network.host)
    proof = edge_proof(Layout(str(network.storage_root)))
    for address in (replica, f"{network.host}:{network.ports['serve_http']}"):
        for headers, status in (({}, 403), ({PROOF: "guess"}, 403), ({PROOF: proof}, 200)):
            connection = http.client.HTTPSConnection(address, context=context(network), timeout=30)
            token = {"Authorization": f"Bearer {network.token()}"}
            connection.request("GET", "/loan-v1/v2/models/loan", headers=headers | token)
            assert connection.getresponse().status == status, (address, headers)
            connection.close()
        server, port = address.split(":")
        with socket.create_connection((server, int(port)), timeout=10) as plain:
            plain.sendall(b"GET /-/healthz HTTP/1.1\r\nhost: h\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")


def test_command_ends_when_both_edges_have_its_change(network: NetworkProject, second: Running) -> None:
    """A start, a change of the weight, and a rollback, at the cluster's edge and at the second one."""
    rollout = ("serve_apps.rollout", "name=loan")
    network.run(*rollout, "action=start", "version=2", "weight=20", check=True)
    assert network.split() == second_split(second)
    assert network.split().endswith("|2000|8000")
    network.run(*rollout, "action=weight", "weight=30", check=True)
    assert network.split() == second_split(second)
    assert network.split().endswith("|3000|7000")
    host, port = second.settings.bind.split(":")
    assert predict(network, host, int(port))[0] == 200
    network.run(*rollout, "action=rollback", check=True)
    assert network.split() == second_split(second)
    assert network.split().endswith("|none|-|0|10000")


def test_models_serve_again_after_the_cluster_was_down(network: NetworkProject) -> None:
    """`cluster.down` and `cluster.up` change nothing for clients: the ledger says what serves."""
    network.run("cluster.down", check=True)
    assert "the deployed models start next" in network.up(*network.options).stdout
    port = network.ports["edge"]
    wait_until(lambda: predict(network, network.host, port)[0] == 200, "the model serves again", seconds=120)


def second_split(edge: Running) -> str:
    return edge.ask(f"show map {edge.settings.map_file}").split()[-1]
