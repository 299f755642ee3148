"""Fixtures: one real cluster for all integration tests.

It uses free ports and its own project folder outside the checkout.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import psutil
import pytest

from cluster.host import processes
from cluster.ledger import Ledger, open_ledger
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import TokenSource
from cluster.session import ClusterRecord, find_record
from cluster.settings import PlatformConfig, PortsConfig, StorageConfig
from cluster.storage import Layout
from tests.processes.commands import COMMAND_TIMEOUT_S, checked, run_process
from tests.processes.forked_commands import run_forked
from tests.projects import loan
from tests.projects.loan import Shop

NUM_REPLICA_PORTS = 1000
FIRST = (
    *("nodes", "promotion", "object_store", "network", "gpu_share", "lost_machines"),
    *("training", "cluster", "own_project", "nothing_lost", "scaling", "protection", "serving", "schedules"),
)
"""Files of tests that run first: those that start clusters of their own, then those that take longest. So no process
runs a long file alone at the end, and the clusters of single files have ended before all processes have theirs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in `FIRST` first, in this order."""
    order = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@dataclass(frozen=True, kw_only=True)
class Project:
    """A folder with its own `.falaj`, and methods that run the platform's commands in it."""

    root: Path
    ports: dict[str, int]
    env: dict[str, str]

    @property
    def storage_root(self) -> Path:
        return self.root / ".falaj"

    @property
    def record(self) -> ClusterRecord:
        record = find_record(StorageConfig(root=str(self.storage_root)))
        assert record is not None, f"no cluster is recorded below {self.root}"
        return record

    @property
    def config(self) -> PlatformConfig:
        return PlatformConfig(storage=StorageConfig(root=str(self.storage_root)))

    def ledger(self) -> Ledger:
        return open_ledger(self.config)

    @property
    def edge_url(self) -> str:
        return self.record.edge_url

    def run(
        self, module: str, *args: str, cwd: Path | None = None, check: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m module args` in a forked process.

        With `check`, a failure shows the command's output.
        """
        result = run_forked(
            module, *args, cwd=cwd or self.root, env=self.env | env, timeout_s=COMMAND_TIMEOUT_S
        )
        return checked(result) if check else result

    def run_python(
        self, *args: str, cwd: Path | None = None, check: bool = False, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter as a new process, for tests of process start."""
        return run_process([sys.executable, *args], cwd=cwd or self.root, env=self.env | env, check=check)

    @property
    def owner(self) -> KeyAccess:
        """Return access to the keys with the rights of the cluster's owner."""
        token = TokenSource(root=str(self.storage_root), subject="owner", role=Role.admin)
        return KeyAccess(socket=self.record.key_socket, token=token)

    def read(self, path: Path) -> pl.DataFrame:
        """Read and decrypt a protected file."""
        return pl.DataFrame(pl.from_arrow(protected_files(self.owner).read(str(path))))

    def up(self, *args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `cluster.up` on this project's ports. The edge reads its port from the record of the cluster."""
        overrides = [f"cluster.ports.{name}={port}" for name, port in self.ports.items()]
        return self.run_python("-m", "cluster.up", *overrides, *args, cwd=self.root, check=check, **env)

    def listeners(self) -> dict[int, str]:
        """Return the address of each TCP port on which a process of the cluster listens."""
        mine = {process.pid for process in processes.find(self.record.cluster_id)}
        return {
            connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.pid in mine
        }

    def without_cluster_variables(self) -> Project:
        """Return the same project with an environment that has no `RAY_` or `FALAJ_` variable."""
        env = {name: value for name, value in self.env.items() if not name.startswith(("RAY_", "FALAJ_"))}
        return Project(root=self.root, ports=self.ports, env=env)

    def token(
        self, role: str = "service", *, subject: str = "tester", purpose: str = "testing", ttl_s: int = 900
    ) -> str:
        """Return a token of this project's development issuer."""
        places = Layout(str(self.storage_root))
        return mint_token(places, subject=subject, role=Role(role), purpose=purpose, ttl_s=ttl_s)


def new_project(root: Path) -> Project:
    """Return a project on free ports. Its environment has no variables of a cluster."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "FALAJ_", "PYTHONPATH"))
    }
    root.mkdir(parents=True, exist_ok=True)
    return Project(root=root, ports=free_ports(), env=clean)


def free_ports() -> dict[str, int]:
    """Return a free port for each of the cluster's ports.

    The ports are between those of Ray's workers and the kernel's ports for clients. If several pytest-xdist workers
    call this at the same time, they get different ports.
    """
    names = list(PortsConfig.__dataclass_fields__)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    blocks = range(20_000, 31_000, NUM_REPLICA_PORTS + 100)[worker::num_workers]
    for base in random.sample(blocks, len(blocks)):
        ports = {name: base + i for i, name in enumerate(names)} | {"replicas": base + 100}
        if all(processes.port_is_free(port, "") for port in ports.values()):
            return ports
    raise AssertionError("no free block of ports")


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """Return the only line that a refused command prints."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("refused: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def exports(output: str) -> dict[str, str]:
    """Parse lines `export NAME=value` by the rules of a shell, and return the variables."""
    words = [shlex.split(line) for line in output.splitlines()]
    assert all(word == "export" and len(rest) == 1 for word, *rest in words), output
    return dict(rest[0].split("=", 1) for _, *rest in words)


@pytest.fixture(scope="session")
def falaj_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Start a cluster, and stop it after the tests.

    The project's `env` has the variables that `cluster.status --env` prints.
    """
    project = new_project(tmp_path_factory.mktemp("project"))
    project.up()
    record = project.record
    try:
        project.env.update(exports(project.run("cluster.status", "--env", check=True).stdout))
        yield project
    finally:
        project.run("cluster.down")
        left = processes.find(record.cluster_id)
        processes.end(record.cluster_id)
    assert left == []


@pytest.fixture(scope="session")
def loan_project(falaj_cluster: Project) -> Project:
    """Return the cluster's project, in which the model `loan` is deployed."""
    loan.prepare(falaj_cluster)
    return falaj_cluster


@pytest.fixture
def shop(loan_project: Project) -> Shop:
    """Return a client of the model `loan`."""
    return Shop(loan_project)


@pytest.fixture
def empty_project(tmp_path: Path) -> Iterator[Project]:
    """Yield a project without a cluster. If the test has started a cluster, stop it afterwards."""
    project = new_project(tmp_path / "project")
    yield project
    if (project.storage_root / "cluster.json").exists():
        project.run("cluster.down", check=True)
