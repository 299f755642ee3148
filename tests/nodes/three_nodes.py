"""A cluster of three nodes: three computers in namespaces, with PostgreSQL, Redis and a double of S3.

The shared state runs beside the computers, in the test's own process, at the bridge's address. Every node has an edge.
`tests/nodes/workload.py` puts a workload on it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.entrypoint import compose_platform
from cluster.ledger import Ledger, open_ledger
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import TokenSource
from cluster.settings import PlatformConfig
from cluster.storage import Layout
from tests.nodes.computers import Computer, end_clusters, running
from tests.nodes.namespaces import Machine, Network, network
from tests.servers import postgresql, redis_server
from tests.servers.object_store import BUCKET, object_store
from tests.servers.small_disk import mounted_small_disk

NAMES = ("head", "second", "third")
SMALL = ("cluster.num_cpus=4", "cluster.object_store_mib=128")
"""Options of each node: logical CPUs, and little memory."""
SMALL_DISK_MIB = 64


@dataclass(kw_only=True)
class ThreeNodes:
    """Three computers and their shared state."""

    net: Network
    computers: dict[str, Computer]
    database: postgresql.Server
    redis: redis_server.Server
    shared: tuple[str, ...]
    """Options of every command on the head."""

    @property
    def head(self) -> Computer:
        return self.computers["head"]

    @property
    def nodes(self) -> list[Computer]:
        """The nodes that join."""
        return [computer for name, computer in self.computers.items() if name != "head"]

    @property
    def token_file(self) -> Path:
        return self.head.root / "node.join"

    @property
    def edges(self) -> dict[str, str]:
        """URL of each edge by the name of its node."""
        return {name: f"https://{each.address}:8443" for name, each in self.computers.items()}

    @property
    def certificate_authority(self) -> str:
        return f"{self.head.storage_root}/tls/ca.pem"

    @property
    def config(self) -> PlatformConfig:
        """The platform's configuration as the test's own process uses it."""
        return compose_platform([*self.shared, f"storage.local={self.head.storage_root}"])

    @property
    def places(self) -> Layout:
        config = self.config.storage
        return Layout(config.root, config.local or "")

    @property
    def ledger(self) -> Ledger:
        return open_ledger(self.config)

    @property
    def owner(self) -> KeyAccess:
        """Access to the keys with the rights of the cluster's owner."""
        token = TokenSource(root=str(self.head.storage_root), subject="owner", role=Role.admin)
        return KeyAccess(socket=self.head.record.key_socket, token=token)

    def token(self, *, role: Role = Role.service, ttl_s: int = 900) -> str:
        """Return a token of the cluster's development issuer."""
        places = Layout(str(self.head.storage_root))
        return mint_token(places, subject="tester", role=role, purpose="testing", ttl_s=ttl_s)

    def up(self, *options: str, check: bool = True) -> None:
        """Run `cluster.up` on the head, and write a join token."""
        head = self.head
        head.run("cluster.up", f"cluster.address={head.address}", *SMALL, *self.shared, *options, check=check)
        self.token_file.unlink(missing_ok=True)
        head.run("cluster.membership.join_token", "--output", str(self.token_file))

    def join(self, computer: Computer, *options: str) -> None:
        """Let a computer join, with an edge."""
        at = f"{self.head.address}:8403"
        own = (f"cluster.address={computer.address}", f"name={computer.name}", "edge=true", *SMALL)
        computer.run("cluster.join", f"head={at}", f"token_file={self.token_file}", *own, *options)


@contextlib.contextmanager
def three_computers(
    folder: Path, *, root: str = "nodes", small_disk_of: str | None = None
) -> Iterator[ThreeNodes]:
    """Switch on three computers and start the shared state. No cluster runs yet.

    While this runs, the test's own process has the environment variables of the object store. At the end, every cluster
    is down. The test is skipped, with a message, on a machine without namespaces or servers.

    Args:
        folder: parent of the computers' folders.
        root: folder of the cluster in the object store.
        small_disk_of: name of a computer whose own state is on a small disk, which a test can fill.
    """
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network(*NAMES))
        database = stack.enter_context(postgresql.server(subnet=net.subnet))
        stored = ("--appendonly", "yes", "--appendfsync", "everysec")
        redis = stack.enter_context(redis_server.server(*stored, host=net.address))
        variables = stack.enter_context(object_store(net.address))
        previous = dict(os.environ)
        stack.callback(os.environ.update, previous)
        stack.callback(os.environ.clear)
        os.environ.update(variables)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "FALAJ_"))}
        computers = {
            name: _computer(name, folder, machine=machine, env=clean)
            for name, machine in net.machines.items()
        }
        if small_disk_of is not None:
            disk = mounted_small_disk(computers[small_disk_of].storage_root, size_mib=SMALL_DISK_MIB)
            stack.enter_context(disk)
        shared = (
            "storage=s3",
            f"storage.root=s3://{BUCKET}/{root}",
            f"ledger.url={database.address.replace('127.0.0.1', net.address)}",
            "online=redis",
            f"online.url={redis.url}",
        )
        stack.enter_context(running(list(computers.values())))
        stack.callback(end_clusters, list(computers.values()), *shared)
        yield ThreeNodes(net=net, computers=computers, database=database, redis=redis, shared=shared)


@contextlib.contextmanager
def three_nodes(folder: Path, *options: str, small_disk_of: str | None = None) -> Iterator[ThreeNodes]:
    """Run a cluster of three nodes.

    Args:
        folder: parent of the computers' folders.
        options: more options of `cluster.up`.
        small_disk_of: see `three_computers`.
    """
    with three_computers(folder, small_disk_of=small_disk_of) as cluster:
        cluster.up(*options)
        for node in cluster.nodes:
            cluster.join(node)
        yield cluster


def _computer(name: str, folder: Path, *, machine: Machine, env: dict[str, str]) -> Computer:
    root = folder / name
    root.mkdir(parents=True)
    return Computer(name=name, machine=machine, root=root, env=dict(env))


def memory_mib(computers: list[Computer]) -> int:
    """Return the resident memory of all processes of the computers, in MiB; shared pages count once per process."""
    total = 0
    for computer in computers:
        for process in computer.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total // 2**20
