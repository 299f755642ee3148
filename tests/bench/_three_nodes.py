"""Weight changes and a first deployment on a cluster of three nodes, each with an edge. Used by the bench `rollout`.

The third node joins and later serves over a slow link (a token bucket in the kernel).

python tests/bench/_three_nodes.py      on the head: change the weight 200 times, and print the seconds as JSON
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.entrypoint import compose_platform
from cluster.ledger import open_ledger
from cluster.session import use_recorded_places
from serve_apps.rollout.serving_state import read_states
from tests.bench.rollout import CHANGES, change_weight
from tests.nodes.computers import Computer
from tests.nodes.three_nodes import ThreeNodes, three_computers
from tests.nodes.workload import head_of, predict_body
from tests.projects import scoring

SERVING_S, REQUESTS = 300.0, 200
REPLICAS = ("replica.num_replicas=3",)
SLOW = os.environ.get("LINK", "2mbit")
"""Rate of the third node's link while it joins and, after the other measurements, while it serves."""


@dataclass(kw_only=True)
class Figures:
    """What was measured, in seconds."""

    once: dict[str, float] = field(default_factory=dict)
    """Durations by name."""
    many: dict[str, list[float]] = field(default_factory=dict)
    """Durations of each of many events by case."""

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure a duration."""
        began = time.perf_counter()
        yield
        self.once[name] = time.perf_counter() - began
        print(f"{name} {self.once[name]:.1f}", flush=True)


def measure_three_nodes(folder: Path) -> Figures:
    """Measure a cluster in an empty folder: its start, the first deployment, weight changes, and a slow link."""
    figures = Figures()
    with three_computers(folder) as cluster:
        second, third = cluster.nodes
        with figures.timed("up_s"):
            cluster.up()
        with figures.timed("join_s"):
            cluster.join(second)
        third.machine.limit_rate(SLOW)
        with figures.timed("join_slow_s"):
            cluster.join(third)
        third.machine.limit_rate(None)
        head = head_of(cluster)
        scoring.prepare(head)
        for node in cluster.nodes:  # its replicas may need the definitions
            (node.root / "scoring.py").write_text(scoring.DEFINITIONS)
        with figures.timed("until_serving_s"):
            scoring.serve(head, *REPLICAS)
            wait_for_both(cluster)
        figures.many["weights"] = change_weights(cluster)
        figures.many["requests"] = ask(cluster, third)
        third.machine.limit_rate(SLOW)
        figures.many["weights_slow"] = change_weights(cluster)
        figures.many["requests_slow"] = ask(cluster, third)
        with figures.timed("leave_slow_s"):
            third.run("cluster.leave", "deadline_s=30")
        third.machine.limit_rate(None)
    return figures


def change_weights(cluster: ThreeNodes) -> list[float]:
    """Change the weight on the head, and return the seconds of each change."""
    command = cluster.head.command(sys.executable, __file__)
    changes = subprocess.run(command, env=cluster.head.env, stdout=subprocess.PIPE, check=True)
    seconds: list[float] = json.loads(changes.stdout)
    return seconds


def ask(cluster: ThreeNodes, computer: Computer) -> list[float]:
    """Send requests to a computer's edge over one connection, and return the seconds of each. None may fail."""
    seconds = []
    for number, connection, headers in requests_to(cluster, cluster.edges[computer.name]):
        began = time.perf_counter()
        connection.request("POST", scoring.PREDICT, json.dumps(predict_body(number)), headers)
        response = connection.getresponse()
        content = response.read()
        seconds.append(time.perf_counter() - began)
        assert response.status == 200, content
        if number == REQUESTS:
            return seconds
    raise AssertionError("requests do not end")


def requests_to(
    cluster: ThreeNodes, url: str
) -> Iterator[tuple[int, http.client.HTTPSConnection, dict[str, str]]]:
    """Yield the number, the connection and the headers of each request to an edge, each with another unit."""
    context = ssl.create_default_context(cafile=cluster.certificate_authority)
    token = {"Authorization": f"Bearer {cluster.token()}"}
    with contextlib.closing(
        http.client.HTTPSConnection(urlsplit(url).netloc, context=context, timeout=60)
    ) as connection:
        for number in itertools.count(1):
            yield number, connection, token | {"X-Unit-ID": str(number)}


def wait_for_both(cluster: ThreeNodes) -> None:
    """Wait until every edge answers with both versions."""
    deadline = time.monotonic() + SERVING_S
    for url in cluster.edges.values():
        versions: set[str] = set()
        for number, connection, headers in requests_to(cluster, url):
            assert time.monotonic() < deadline, f"{url} does not answer with both versions"
            connection.request("POST", scoring.PREDICT, json.dumps(predict_body(number)), headers)
            response = connection.getresponse()
            content = json.loads(response.read())
            if response.status == 200:
                versions.add(content["model_version"])
            if len(versions) == 2:
                break


def main() -> None:
    """Change the weight of the running rollout, and print the seconds of each change."""
    config = compose_platform(())
    use_recorded_places(config, given=())
    ledger = open_ledger(config)
    rollout = read_states(ledger)[scoring.MODEL].rollout
    assert rollout is not None
    names = {"model": scoring.MODEL, "rollout": rollout.id}
    weights = [1 + number % 40 for number in range(CHANGES)]
    print(json.dumps([change_weight(config, ledger, weight=weight, **names) for weight in weights]))


if __name__ == "__main__":
    main()
