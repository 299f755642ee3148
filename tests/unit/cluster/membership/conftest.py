"""A head's service for nodes on loopback, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from cluster.ledger import Ledger, open_ledger
from cluster.membership import join_token
from cluster.membership.admission import Application, new_key_and_request
from cluster.membership.head_client import HeadClient, first_request
from cluster.membership.members import Members
from cluster.membership.release import release
from cluster.membership.service import NodeService
from cluster.membership.transport import Server, client_context
from cluster.node.description import describe_machine
from cluster.security.tls.certificates import NODE_CERTIFICATE_NAME, NODE_KEY_NAME, ensure_tls
from cluster.security.tokens.issuer import ensure_issuer, replace_private_file, write_private_file
from cluster.session import ClusterRecord
from cluster.settings import (
    ClusterConfig,
    LedgerConfig,
    OnlineConfig,
    OnlineKind,
    PlatformConfig,
    PortsConfig,
    StorageConfig,
)
from cluster.storage import local
from tests.servers.ports import free_port

NODE_ADDRESS = "127.0.0.2"
"""Another address of this machine, so that head and node have different ones."""


@dataclass
class Head:
    """A head's service, and what a node does with it."""

    config: PlatformConfig
    record: ClusterRecord
    ledger: Ledger
    service: NodeService
    folder: Path

    @property
    def url(self) -> str:
        return f"{self.record.address}:{self.record.ports['nodes']}"

    def application(self, **changes: object) -> tuple[bytes, Application]:
        """Return a new key, and a request to join that the head accepts unless `changes` break it."""
        key, request = new_key_and_request("node-2")
        application = Application(
            token=join_token.mint(self.record.layout).text,
            release=release(),
            name="node-2",
            address=NODE_ADDRESS,
            region="eu",
            num_cpus=2,
            num_gpus=0,
            edge=False,
            signing_request=request,
        )
        return key, replace(application, **changes)  # type: ignore[arg-type]

    def ask(self, application: Application, *, own_address: str = NODE_ADDRESS) -> dict[str, object]:
        """Send a request to join."""
        authority = join_token.mint(self.record.layout).authority
        message = {"op": "join", **asdict(application)}
        return first_request(self.url, client_context(authority=authority), message, own_address=own_address)

    def join(self) -> tuple[str, HeadClient]:
        """Join, and return the node's id and its client."""
        key, application = self.application()
        answer = self.ask(application)
        tls = self.folder / str(answer["node_id"])
        tls.mkdir()
        replace_private_file(tls / NODE_KEY_NAME, key)
        replace_private_file(tls / NODE_CERTIFICATE_NAME, str(answer["certificate"]).encode())
        replace_private_file(tls / "ca.pem", str(answer["authority"]).encode())
        return str(answer["node_id"]), HeadClient(self.url, tls=tls, address=NODE_ADDRESS)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """Run the service. Its configuration passes as shared, although the ledger is a SQLite file."""
    ports = PortsConfig(**{name: free_port() for name in PortsConfig.__dataclass_fields__})
    config = PlatformConfig(
        storage=StorageConfig(root=f"memory://{tmp_path.name}", local=str(tmp_path / "disk")),
        ledger=LedgerConfig(url=f"sqlite:///{tmp_path}/ledger.db"),
        online=OnlineConfig(kind=OnlineKind.redis, url="redis://10.0.0.9/0"),
        cluster=ClusterConfig(ports=ports),
    )
    monkeypatch.setattr("cluster.membership.admission.require_shared_state", lambda config: None)
    record = replace(describe_machine(config, cluster_id="abc"), overrides=["++ledger.checkpoint_every='7'"])
    places = record.layout
    local(places.keys).mkdir(parents=True, mode=0o700)
    ensure_tls(places)
    ensure_issuer(places)
    join_token.ensure_join_key(places)
    write_private_file(local(places.keys) / "ray_token", b"the token of Ray")
    ledger = open_ledger(config)
    service = NodeService(config=config, record=record, ledger=ledger, members=Members(ledger, "abc"))
    stopped, server = (
        threading.Event(),
        Server((record.address, ports.nodes), tls=local(places.tls), serve=service.serve),
    )
    thread = threading.Thread(target=server.run, args=(stopped,))
    thread.start()
    assert server.ready.wait(10)
    yield Head(config=config, record=record, ledger=ledger, service=service, folder=tmp_path)
    stopped.set()
    thread.join(10)
