"""Test of a head that is killed with all its processes while Ray's state is in Redis."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.host import processes
from cluster.ledger.events import ClusterStarted, ClusterStopped, NodeLeft
from cluster.node.parts import Part, find_parts
from tests.nodes.failures import HEAD_DOWN_S
from tests.nodes.two_machines import SECOND, Computer, World, predict, split, two_machines
from tests.servers.polling import wait_until

PASSWORD = "correct-horse-battery-staple"
UP_TIMEOUT_S = 500.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Start a head and a node with an edge. The GCS has a Redis of its own, with a password."""
    secret = tmp_path_factory.mktemp("secret") / "redis.password"
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    with two_machines(tmp_path_factory.mktemp("restart"), gcs_password_file=secret) as world:
        yield world


def test_nodes_and_applications_outlive_the_head(world: World) -> None:
    """kill -9 of all processes of the head. The node's replica answers all the time, through the node's edge.

    `cluster.up` finds the node and the application again: the replica is the same process as before. Then a command of
    the head changes what both edges serve. The password of Redis is in no command line and in no log.
    """
    head, node = world.head, world.node
    node.join(world.url, world.token, "edge=true")
    definitions, train = "definitions=shop", ("model=lightgbm", "name=loan", "label=repaid")
    head.run("feature_jobs.apply", definitions, *head.shared)
    for command in ("ingest", "materialize"):
        head.run(f"feature_jobs.{command}", definitions, "view=income", *head.shared)
    build = ("service=credit", "entities=people.parquet", "output=train.parquet")
    head.run("feature_jobs.training_set", definitions, *build, *head.shared)
    head.run("jobs.train", *train, "training_set=train.parquet", *head.shared)
    placed = f"placement.region={SECOND}"
    head.run("serve_apps.deploy", "name=loan", "version=1", placed, *head.shared)
    before, answers = replicas(node), Answers(world)
    assert before
    status, content = predict(world, node)  # the replica gets its keys from the head's key broker
    assert status == 200, content

    with answers:
        kill_everything(head)
        time.sleep(HEAD_DOWN_S)
        start_again(head)
        wait_until(lambda: head.run("cluster.status", *head.shared, check=False).returncode == 0, seconds=90)
        head.run("jobs.train", *train, "training_set=train.parquet", *head.shared)
        rollout = ("serve_apps.rollout", "name=loan", "action=start", "version=2", "weight=20", placed)
        head.run(*rollout, *head.shared)
    print(f"{answers.count} answers of the node's edge, {len(answers.failures)} failures")
    if answers.failures:
        print(replica_errors(node))
    assert replicas(node) >= before
    assert split(head) == split(node)
    assert split(head).endswith("|2000|8000")
    assert answers.count > 20
    assert answers.failures == []
    assert len(list(world.ledger.entries(ClusterStarted))) == 1
    assert not list(world.ledger.entries(ClusterStopped))
    assert not list(world.ledger.entries(NodeLeft))
    require_secret(world)


def start_again(head: Computer) -> None:
    """Run `cluster.up`. On a busy machine, Ray may need several tries."""
    started = time.monotonic()
    command = ("-m", "cluster.up", f"cluster.address={head.machine.address}", *head.shared)
    result = subprocess.run(
        head.machine.command(sys.executable, *command),
        cwd=head.root,
        env=head.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=UP_TIMEOUT_S,
    )
    log = (head.root / ".falaj" / "edge" / "supervisor.log").read_text()
    assert result.returncode == 0, result.stdout + result.stderr + log[-8000:]
    assert "has lost its head; the other nodes stay in it" in result.stdout
    print(f"cluster.up after the crash took {time.monotonic() - started:.0f} s")


def replicas(computer: Computer) -> set[int]:
    """Return the process ids of the model's replicas on a machine."""
    return {
        process.pid
        for process in processes.find(computer.record.instance)
        if any("loan-v1" in text for text in (process.name(), *process.cmdline()))
    }


def replica_errors(computer: Computer) -> str:
    """Return the last errors in the logs of a machine's replicas."""
    logs = Path(computer.record.temp_dir, "session_latest", "logs", "serve").glob("replica*")
    return "\n".join(log.read_text(errors="replace")[-6000:] for log in logs)


def kill_everything(computer: Computer) -> None:
    """Kill all processes of a machine at once, the supervisor first."""
    record = computer.record
    supervisor = find_parts(record)[Part.supervisor]
    for process in (supervisor, *processes.find(record.instance)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def require_secret(world: World) -> None:
    """Require that the password of Redis is in no command line and in no file of the cluster."""
    for process in psutil.process_iter(["cmdline"]):
        if "redis-server" not in process.name():
            assert PASSWORD not in " ".join(process.info["cmdline"] or ())
    for computer in (world.head, world.node):
        for folder in (Path(computer.record.runtime_folder), computer.root / ".falaj"):
            for path in folder.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    assert PASSWORD.encode() not in path.read_bytes(), path


class Answers:
    """Sends requests to the node's edge until the `with` block ends. Counts them, and lists those that failed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0
        self.failures: list[str] = []

    def __enter__(self) -> Answers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(90)

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stopped.wait(0.5):
            try:
                status, content = predict(self._world, self._world.node)
                if status != 200:
                    after_s = time.monotonic() - started
                    self.failures.append(f"after {after_s:.0f} s: {status} {json.dumps(content)}")
            except OSError as error:
                self.failures.append(repr(error))
            self.count += 1
