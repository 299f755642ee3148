"""Tests of a cluster with two machines."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.host import processes
from cluster.ledger.events import NodeJoined, NodeLeft
from cluster.session import metrics_urls
from tests.integration.conftest import refusal
from tests.integration.test_object_store import ROWS
from tests.nodes.two_machines import SECOND, Computer, World, predict, split, two_machines
from tests.servers.polling import wait_until

ENDED_S = 40.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Start the shared state and the head. At the end, nothing is left of head and node."""
    with two_machines(tmp_path_factory.mktemp("nodes")) as world:
        yield world


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
    wait_until(lambda: world.head.nodes()[0]["state"] == "dead", seconds=ENDED_S)
    assert world.head.run("cluster.status", *world.head.shared, check=False).returncode == 1
    world.node.join(world.url, world.token)
    assert world.node.record.node_id != first.node_id
    reasons = [entry.payload["reason"] for entry in world.ledger.entries(NodeLeft)]
    assert reasons == ["replaced"]


def test_killed_raylet_of_a_node_comes_back(world: World) -> None:
    """The node's supervisor starts Ray again."""
    [raylet] = [each for each in processes.find(world.node.record.instance) if each.name() == "raylet"]
    raylet.kill()
    wait_until(lambda: world.node.run("cluster.status", check=False).returncode == 0, seconds=90)
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
