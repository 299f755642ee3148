"""Tests of a cluster with two machines, each in its own network namespace.

PostgreSQL, Redis and a double of S3 have the shared state. They run beside the two machines, at the bridge's address.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.host import processes
from cluster.ledger import Ledger
from cluster.ledger.events import NodeJoined, NodeLeft
from cluster.security.tokens.issuer import mint_token
from cluster.security.tokens.roles import Role
from cluster.session import ClusterRecord, find_own_record, metrics_urls
from cluster.settings import StorageConfig
from cluster.storage import Layout
from tests.integration.conftest import refusal
from tests.integration.test_object_store import ROWS, write_rows
from tests.nodes.namespaces import Machine, network
from tests.servers.object_store import BUCKET, object_store
from tests.servers.postgresql import running_server
from tests.servers.redis_server import running_redis

COMMAND_TIMEOUT_S = 300.0
ENDED_S = 40.0
SECOND = "second-region"


@dataclass(frozen=True, kw_only=True)
class Computer:
    """A machine with its own folder."""

    machine: Machine
    root: Path
    env: dict[str, str]
    shared: tuple[str, ...]
    """Options of every command on the head."""

    def run(self, module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python -m module args` on this machine."""
        result = subprocess.run(
            self.machine.command(sys.executable, "-m", module, *args),
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        if check and result.returncode:
            pytest.fail(f"{result.args} exited {result.returncode}\n{result.stdout}\n{result.stderr[-8000:]}")
        return result

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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Start the shared state and the head. At the end, nothing is left of head and node."""
    folder = tmp_path_factory.mktemp("nodes")
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(network("head", "node"))
        postgresql = stack.enter_context(running_server(subnet=net.subnet))
        redis = stack.enter_context(running_redis(host=net.address))
        s3 = stack.enter_context(object_store(net.address))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "FALAJ_"))}
        shared = (
            "storage=s3",
            f"storage.root=s3://{BUCKET}/nodes",
            f"ledger.url={postgresql.replace('127.0.0.1', net.address)}",
            "online=redis",
            f"online.url={redis}",
        )
        computers = {}
        for name, machine in net.machines.items():
            root = folder / name
            root.mkdir()
            computers[name] = Computer(
                machine=machine,
                root=root,
                env=clean | s3,
                shared=shared if name == "head" else (),
            )
        head, node = computers["head"], computers["node"]
        stack.callback(end_everything, [head, node])
        write_rows(head.root)
        (node.root / "shop.py").write_text((head.root / "shop.py").read_text())
        head.run("cluster.up", f"cluster.address={head.machine.address}", "cluster.num_cpus=4", *shared)
        token = folder / "node.join"
        head.run("cluster.membership.join_token", "--output", str(token))
        yield World(head=head, node=node, ledger=Ledger(postgresql), token=token)


def end_everything(computers: list[Computer]) -> None:
    """End both machines, and check that `cluster.down` left nothing."""
    left = []
    for computer in reversed(computers):
        if (computer.root / ".falaj" / "cluster.json").exists():
            instance = computer.record.instance
            computer.run("cluster.down", *computer.shared, check=False)
            left += processes.find(instance)
            processes.end(instance)
    assert left == []


def wait_for(condition: Any, *, timeout_s: float = ENDED_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.5)


def scraped(computer: Computer, port: str) -> str:
    """Return the metrics of a port. It is on the machine's loopback, and `cluster.status` prints its URL."""
    url = f"http://127.0.0.1:{computer.record.ports[port]}/metrics"
    assert url in metrics_urls(computer.record)
    program = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=10).read().decode())"
    read = subprocess.run(
        computer.machine.command(sys.executable, "-c", program), capture_output=True, text=True, check=True
    )
    return read.stdout


def test_machine_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    """Each message says what, which and what to do. Nothing runs or is recorded afterwards."""
    wrong = tmp_path / "wrong.join"
    wrong.write_text(world.token.read_text().replace(".", ".1", 1))
    wrong.chmod(0o600)
    assert "join token is wrong" in refusal(world.node.join(world.url, wrong, check=False))
    unreachable = f"{world.head.machine.address}:9"
    assert f"No head answers at {unreachable}" in refusal(
        world.node.join(unreachable, world.token, check=False)
    )
    loopback = world.node.run("cluster.join", f"head={world.url}", f"token_file={world.token}", check=False)
    assert "cluster.address is loopback" in refusal(loopback)
    other = world.node.join(world.url, world.token, "ledger.url=sqlite:///x", check=False)
    assert "ledger.url is a setting of the whole cluster" in refusal(other)
    assert not (world.node.root / ".falaj" / "cluster.json").exists()
    assert not list(world.ledger.entries(NodeJoined))


def test_work_in_another_region_runs_on_the_node_that_joined(world: World) -> None:
    """Its tasks open keys and read a feature table there, with the job's own intent. The hash is as on the head.

    A job that starts on that node can also have its tasks on the head.
    """
    world.node.join(world.url, world.token, "edge=true")
    [status] = world.head.nodes()
    assert (status["address"], status["region"], status["state"]) == (
        world.node.machine.address,
        SECOND,
        "running",
    )
    assert [node["name"] for node in world.node.nodes()] == ["head"]
    assert "falaj_nodes_alive 1.0" in scraped(world.head, "nodes_metrics")
    for computer in (world.head, world.node):
        assert "falaj_uploader_round_seconds_count" in scraped(computer, "uploader_metrics")
    head, definitions = world.head, "definitions=shop"
    head.run("feature_jobs.apply", definitions, *head.shared)
    head.run("feature_jobs.ingest", definitions, "view=income", *head.shared)
    build = ("feature_jobs.training_set", definitions, "service=credit", "entities=people.parquet")
    here = head.run(*build, "output=here.parquet", *head.shared)
    there = head.run(
        *build, "output=there.parquet", "task_rows=0", f"placement.region={SECOND}", *head.shared
    )
    assert f"{ROWS} rows" in there.stdout
    assert there.stdout.split("hash")[1] == here.stdout.split("hash")[1]
    intent = world.node.root / "intent.jwt"
    identity = ("cluster.security.identity", "intent", "--sub", "alice", "--role", "admin")
    head.run(*identity, "--entrypoint", build[0], "--output", str(intent))
    (world.node.root / "people.parquet").write_bytes((head.root / "people.parquet").read_bytes())
    from_node = world.node.run(
        *build,
        "output=there.parquet",
        "task_rows=0",
        "placement.region=local",
        f"identity.token_file={intent}",
        *head.shared,
    )
    assert from_node.stdout.split("hash")[1] == here.stdout.split("hash")[1]
    nowhere = head.run(
        *build, "output=x.parquet", "task_rows=0", "placement.region=mars", *head.shared, check=False
    )
    assert "no node is in this region" in refusal(nowhere)


def test_replica_runs_on_the_node_that_joined(world: World) -> None:
    """It gets its token from the head, loads the encrypted model from the object store, and reads Redis.

    The commands find ledger, storage root and online store in the record of the cluster.
    """
    head = world.head
    head.run("feature_jobs.materialize", "definitions=shop", "view=income")
    train = ("model=lightgbm", "name=loan", "training_set=here.parquet", "label=repaid")
    head.run("jobs.train", *train)
    head.run("serve_apps.deploy", "name=loan", "version=1", f"placement.region={SECOND}")
    replicas = [
        process
        for process in processes.find(world.node.record.instance)
        if "ServeReplica:loan" in process.name() or any("loan-v1" in text for text in process.cmdline())
    ]
    assert replicas


def split(computer: Computer) -> str:
    """Return the model's map entry in a machine's edge."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{computer.record.runtime_folder}/edge.sock")
        connection.sendall(f"show map {computer.root}/.falaj/edge/routes.map\n".encode())
        shown = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    return shown.split()[-1]


def predict(world: World, computer: Computer) -> tuple[int, dict[str, Any]]:
    """Ask a machine's edge for a prediction, at the machine's address."""
    places = Layout(str(world.head.root / ".falaj"))
    context = ssl.create_default_context(cafile=f"{places.tls}/ca.pem")
    port = computer.record.ports["edge"]
    connection = http.client.HTTPSConnection(computer.machine.address, port, context=context, timeout=60)
    token = mint_token(places, subject="t", role=Role.service, purpose="test", ttl_s=900)
    headers = {"Authorization": f"Bearer {token}", "X-Unit-ID": "39"}
    body = json.dumps({"entities": [{"customer_id": 39}]})
    connection.request("POST", "/v1/models/loan:predict", body, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_both_edges_reach_the_replica_and_have_each_change(world: World) -> None:
    """The replica is on the node; the head's edge reaches it by TLS. A command ends when both edges have its change."""
    head, node = world.head, world.node
    for computer in (head, node):
        status, content = predict(world, computer)
        assert (status, content["model_version"]) == (200, "1"), content
    train = ("model=lightgbm", "name=loan", "training_set=here.parquet", "label=repaid")
    head.run("jobs.train", *train, *head.shared)
    rollout = ("serve_apps.rollout", "name=loan", *head.shared)
    head.run(*rollout, "action=start", "version=2", "weight=20", f"placement.region={SECOND}")
    assert split(head) == split(node)
    assert split(head).endswith("|2000|8000")
    head.run(*rollout, "action=rollback")
    assert split(head) == split(node)
    assert split(head).endswith("|none|-|0|10000")


def test_dead_node_is_shown_and_can_join_again(world: World) -> None:
    """kill -9 of all its processes: the head says so, and a new join takes the dead one's place."""
    first = world.node.record
    for process in processes.find(first.instance):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    wait_for(lambda: world.head.nodes()[0]["state"] == "dead")
    assert world.head.run("cluster.status", *world.head.shared, check=False).returncode == 1
    world.node.join(world.url, world.token)
    assert world.node.record.node_id != first.node_id
    reasons = [entry.payload["reason"] for entry in world.ledger.entries(NodeLeft)]
    assert reasons == ["replaced"]


def test_killed_raylet_of_a_node_comes_back(world: World) -> None:
    """The node's supervisor starts Ray again."""
    [raylet] = [each for each in processes.find(world.node.record.instance) if each.name() == "raylet"]
    raylet.kill()
    wait_for(lambda: world.node.run("cluster.status", check=False).returncode == 0, timeout_s=90)
    running = [each.pid for each in processes.find(world.node.record.instance) if each.name() == "raylet"]
    assert set(running) - {raylet.pid}


def test_node_leaves(world: World) -> None:
    """Nothing of it is left: no process, no certificate, no token. The ledger says that it has left."""
    record = world.node.record
    world.node.run("cluster.leave", "deadline_s=30")
    assert processes.find(record.instance) == []
    assert not (world.node.root / ".falaj" / "cluster.json").exists()
    assert not list((world.node.root / ".falaj" / "tls").iterdir())
    assert not (world.node.root / ".falaj" / "keys" / "ray_token").exists()
    left = [entry.payload for entry in world.ledger.entries(NodeLeft)]
    assert left[-1] == {
        "cluster_id": record.cluster_id,
        "node_id": record.node_id,
        "reason": "left",
    }
    assert world.head.nodes() == []
