"""The peer: Ray Serve on three nodes, for the same failures. Its state is in Redis, and an ended node starts again."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis

from tests.clients.balanced_load import BalancedLoad, Kind, Sent
from tests.nodes import ray_serve_app, workload
from tests.nodes.computers import REPOSITORY, Computer
from tests.nodes.falaj import Lost
from tests.nodes.three_nodes import ThreeNodes
from tests.projects import scoring
from tests.servers.polling import wait_until

GCS_PORT = 6379
START_S = 240
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(kw_only=True)
class RayServe:
    """The peer's cluster and its workload."""

    cluster: ThreeNodes
    predict_per_s: float
    push_per_s: float
    _next: int = 0

    @property
    def per_s(self) -> float:
        return self.predict_per_s + self.push_per_s

    def entry(self, computer: Computer) -> list[psutil.Process]:
        return computer.titled("ProxyActor")

    def start_head(self) -> None:
        self._start(self.cluster.head, "--head", f"--port={GCS_PORT}", "--dashboard-host=127.0.0.1")

    def start_node(self, computer: Computer) -> None:
        self._start(computer, f"--address={self.cluster.head.address}:{GCS_PORT}")

    def drain(self, computer: Computer) -> None:
        [raylet] = [one for one in computer.members() if one.name() == "raylet"]
        [node_id] = [text.partition("=")[2] for text in raylet.cmdline() if text.startswith("--node_id=")]
        command = (
            f"--address={self.cluster.head.address}:{GCS_PORT}",
            f"--node-id={node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=leave",
            "--deadline-remaining-seconds=60",
        )
        drain = computer.command(RAY, "drain-node", *command)
        subprocess.run(drain, env=computer.env, check=True, capture_output=True, timeout=60)
        psutil.wait_procs([raylet], timeout=60)
        computer.kill_all()

    def disk(self, computer: Computer) -> Path:
        return computer.root / ".falaj"

    def start_app(self) -> None:
        """Start the application from the head."""
        num_nodes = str(len(self.cluster.computers))
        self.cluster.head.run("tests.nodes.ray_serve_app", self.cluster.redis.url, num_nodes)

    def load(self) -> BalancedLoad:
        """Return the same load as on Falaj, without TLS and tokens."""
        first = self._next
        path = f"/{ray_serve_app.APP}"
        kinds = {
            "predict": Kind(path=path, per_s=self.predict_per_s, body=workload.predict_body),
            "push": Kind(
                path=f"{path}/push",
                per_s=self.push_per_s,
                body=lambda number: workload.push_body(first + number, run="", at=""),
            ),
        }
        return BalancedLoad(
            servers={
                name: f"http://{each.address}:{ray_serve_app.PORT}"
                for name, each in self.cluster.computers.items()
            },
            health_path="/-/healthz",
            kinds=kinds,
            headers=lambda number: {"X-Unit-ID": str(number)},
        )

    def lost(self, sent: Collection[Sent]) -> Lost:
        """Compare the answers with the records on all disks, and with the values in Redis."""
        good = [one for one in sent if one.is_good]
        logged = set[str]()
        for computer in self.cluster.computers.values():
            path = self.disk(computer) / ray_serve_app.RECORDS
            for line in path.read_text().splitlines() if path.exists() else ():
                if line.startswith("{") and line.endswith("}"):
                    logged.add(json.loads(line)["id"])
        first = self._next
        self._next += 1 + max((one.number for one in sent if one.kind == "push"), default=-1)
        stored = redis.Redis.from_url(self.cluster.redis.url).hgetall("pushed")
        online = {int(account): int(value) for account, value in stored.items()}
        pushed = {first + one.number for one in good if one.kind == "push"}
        ids = [one.content["prediction_id"] for one in good if one.kind == "predict"]
        return Lost(
            records=sum(one not in logged for one in ids),
            pushes=sum(online.get(one % scoring.ACCOUNTS, -1) < one for one in pushed),
        )

    def _start(self, computer: Computer, *options: str) -> None:
        command = (
            *(sys.executable, "-m", "tests.processes.restarting", RAY, "start", "--block"),
            *(f"--node-ip-address={computer.address}", "--num-cpus=4", "--object-store-memory=134217728"),
            *("--disable-usage-stats", f"--temp-dir=/tmp/{computer.machine.namespace}", *options),
        )
        with (computer.root / "ray.log").open("ab") as log:
            subprocess.Popen(computer.command(*command), env=computer.env, stdout=log, stderr=log)

    def num_nodes(self) -> int:
        """Return the number of nodes with a raylet."""
        return sum(
            any(one.name() == "raylet" for one in computer.members())
            for computer in self.cluster.computers.values()
        )


@contextmanager
def running(cluster: ThreeNodes, *, predict_per_s: float, push_per_s: float) -> Iterator[RayServe]:
    """Start Ray on three computers, and the application."""
    models = cluster.head.root / "models"
    models.mkdir()
    ray_serve_app.write_state(cluster.redis.url, str(models))
    system = RayServe(cluster=cluster, predict_per_s=predict_per_s, push_per_s=push_per_s)
    for computer in cluster.computers.values():
        system.disk(computer).mkdir(exist_ok=True)
        computer.env |= {
            ray_serve_app.DISK: str(system.disk(computer)),
            ray_serve_app.MODELS: str(models),
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # else only the head has a proxy
            "RAY_worker_niceness": "0",
        }
    cluster.head.env["RAY_REDIS_ADDRESS"] = cluster.redis.url.removeprefix("redis://").partition("/")[0]
    system.start_head()
    head = (cluster.head.address, GCS_PORT)
    wait_until(lambda: accepts(head), "Ray's GCS on the head", seconds=START_S)
    for node in cluster.nodes:
        system.start_node(node)
    wait_until(lambda: system.num_nodes() == len(cluster.computers), "Ray on all nodes", seconds=START_S)
    system.start_app()
    wait_until(
        lambda: all(system.entry(computer) for computer in cluster.computers.values()),
        "a proxy of Ray Serve on every node",
        seconds=START_S,
    )
    yield system


def accepts(address: tuple[str, int]) -> bool:
    """Return whether a process accepts connections at an address."""
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True
