"""A cluster with two machines, each in its own network namespace.

PostgreSQL, Redis and a double of S3 have the shared state. They run beside the two machines, at the bridge's address.
Unlike `computers`, both machines share process ids.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.host import processes
from cluster.ledger import Ledger
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, find_own_record
from cluster.settings import StorageConfig
from cluster.storage import Layout
from tests.integration.test_object_store import write_rows
from tests.nodes.namespaces import Machine, network
from tests.processes.commands import COMMAND_TIMEOUT_S, checked, run_process
from tests.processes.forked_commands import run_forked
from tests.projects import loan
from tests.servers.object_store import BUCKET, object_store
from tests.servers.postgresql import running_server
from tests.servers.redis_server import running_redis

SECOND = "second-region"
NEW_PROCESSES = ("cluster.up", "cluster.join")


@dataclass(frozen=True, kw_only=True)
class Computer:
    """A machine with its own folder."""

    machine: Machine
    root: Path
    env: dict[str, str]
    shared: tuple[str, ...] = ()
    """Options of every command on the head."""

    def run(self, module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python -m module args` on this machine, in a forked process.

        The commands that start the processes of a node are new processes themselves.
        """
        if module in NEW_PROCESSES:
            line = self.machine.command(sys.executable, "-m", module, *args)
            return run_process(line, cwd=self.root, env=self.env, check=check)
        result = run_forked(
            module,
            *args,
            cwd=self.root,
            env=self.env,
            timeout_s=COMMAND_TIMEOUT_S,
            namespace=self.machine.namespace,
        )
        return checked(result) if check else result

    def join(
        self, head: str, token: Path, *args: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `cluster.join` on this machine."""
        own = (f"cluster.address={self.machine.address}", f"cluster.region={SECOND}", "cluster.num_cpus=2")
        return self.run("cluster.join", f"head={head}", f"token_file={token}", *own, *args, check=check)

    @property
    def record(self) -> ClusterRecord:
        record = find_own_record(StorageConfig(root=str(self.root / ".falaj")))
        assert record is not None
        return record

    def nodes(self) -> list[dict[str, Any]]:
        """Return the other nodes as `cluster.status` shows them here."""
        nodes: list[dict[str, Any]] = json.loads(
            self.run("cluster.status", "--json", *self.shared, check=False).stdout
        )["nodes"]
        return nodes


@dataclass(frozen=True, kw_only=True)
class World:
    """Two machines, and the ledger that they share."""

    head: Computer
    node: Computer
    ledger: Ledger
    token: Path

    @property
    def url(self) -> str:
        return f"{self.head.machine.address}:{self.head.record.ports['nodes']}"


@contextlib.contextmanager
def two_machines(folder: Path, *, gcs_password_file: Path | None = None) -> Iterator[World]:
    """Start the shared state and the head. At the end, nothing is left of head and node.

    Args:
        folder: parent of the machines' folders.
        gcs_password_file: file with the password of a second Redis, which has Ray's state. None for no such Redis.
    """
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network("head", "node"))
        postgresql = stack.enter_context(running_server(subnet=net.subnet))
        redis = stack.enter_context(running_redis(host=net.address))
        s3 = stack.enter_context(object_store(net.address))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "FALAJ_"))}
        shared: tuple[str, ...] = (
            "storage=s3",
            f"storage.root=s3://{BUCKET}/nodes",
            f"ledger.url={postgresql.replace('127.0.0.1', net.address)}",
            "online=redis",
            f"online.url={redis}",
        )
        if gcs_password_file is not None:
            password = ("--requirepass", gcs_password_file.read_text())
            gcs = stack.enter_context(running_redis(*password, host=net.address))
            shared += (
                f"cluster.gcs.url={gcs.removesuffix('/0')}",
                f"cluster.gcs.password_file={gcs_password_file}",
            )
        computers = {}
        for name, machine in net.machines.items():
            root = folder / name
            root.mkdir()
            options = shared if name == "head" else ()
            computers[name] = Computer(machine=machine, root=root, env=clean | s3, shared=options)
        head, node = computers["head"], computers["node"]
        stack.callback(end_everything, [head, node])
        write_rows(head.root)
        (node.root / "shop.py").write_text((head.root / "shop.py").read_text())
        head.run("cluster.up", f"cluster.address={head.machine.address}", "cluster.num_cpus=4", *shared)
        token = folder / "node.join"
        head.run("cluster.membership.join_token", "--output", str(token))
        yield World(head=head, node=node, ledger=Ledger(postgresql), token=token)


def end_everything(computers: Sequence[Computer]) -> None:
    """End both machines, and check that `cluster.down` left nothing."""
    left = []
    for computer in reversed(computers):
        if (computer.root / ".falaj" / "cluster.json").exists():
            instance = computer.record.instance
            computer.run("cluster.down", *computer.shared, check=False)
            left += processes.find(instance)
            processes.end(instance)
    assert left == []


def split(computer: Computer) -> str:
    """Return the model's map entry in a machine's edge."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{computer.record.runtime_folder}/edge.sock")
        connection.sendall(f"show map {computer.root}/.falaj/edge/routes.map\n".encode())
        shown = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    return shown.split()[-1]


def predict(world: World, computer: Computer) -> tuple[int, dict[str, Any]]:
    """Ask a machine's edge for a prediction, at the machine's address."""
    return send(computer, {"entities": [{"customer_id": 39}]}, unit=39, tokens_of=world.head)


def send(
    computer: Computer, body: dict[str, Any], *, unit: int, tokens_of: Computer
) -> tuple[int, dict[str, Any]]:
    """Send a request for a prediction of `loan` to a machine's edge. Return its status and JSON.

    Args:
        computer: the machine with the edge.
        body: content of the request.
        unit: id of the unit.
        tokens_of: the machine with the development issuer and the certificate authority.
    """
    places = Layout(str(tokens_of.root / ".falaj"))
    context = ssl.create_default_context(cafile=f"{places.tls}/ca.pem")
    token = mint_token(places, subject="t", role=Role.service, purpose="test", ttl_s=900)
    headers = {"Authorization": f"Bearer {token}", "X-Unit-ID": str(unit)}
    port = computer.record.ports["edge"]
    connection = http.client.HTTPSConnection(computer.machine.address, port, context=context, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", loan.PREDICT, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
