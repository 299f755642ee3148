"""Weight changes and a first deployment on a cluster of three nodes, each with an edge. Used by the bench `rollout`.

python tests/bench/_three_nodes.py      on the head: change the weight 200 times, and print the seconds as JSON
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.entrypoint import compose_platform
from cluster.ledger import open_ledger
from cluster.session import use_recorded_places
from serve_apps.rollout.serving_state import read_states
from tests.bench.rollout import CHANGES, change_weight
from tests.nodes.three_nodes import ThreeNodes, three_nodes
from tests.nodes.workload import head_of, predict_body
from tests.projects import scoring

SERVING_S = 300.0
REPLICAS = ("replica.num_replicas=3",)


def measure_three_nodes(folder: Path) -> tuple[list[float], dict[str, float]]:
    """Return the seconds of each weight change, and seconds by name: of the start, and until both versions serve.

    Args:
        folder: Empty folder for the nodes.
    """
    began = time.perf_counter()
    with three_nodes(folder) as cluster:
        started_s = time.perf_counter() - began
        head = head_of(cluster)
        scoring.prepare(head)
        for node in cluster.nodes:  # its replicas may need the definitions
            (node.root / "scoring.py").write_text(scoring.DEFINITIONS)
        began = time.perf_counter()
        scoring.serve(head, *REPLICAS)
        wait_for_both(cluster)
        seconds = {"start_s": started_s, "until_serving_s": time.perf_counter() - began}
        command = cluster.head.command(sys.executable, __file__)
        changes = subprocess.run(command, env=cluster.head.env, stdout=subprocess.PIPE, check=True)
        return json.loads(changes.stdout), seconds


def wait_for_both(cluster: ThreeNodes) -> None:
    """Wait until every edge answers with both versions."""
    context = ssl.create_default_context(cafile=cluster.certificate_authority)
    headers = {"Authorization": f"Bearer {cluster.token()}"}
    deadline = time.monotonic() + SERVING_S
    for url in cluster.edges.values():
        versions: set[str] = set()
        connection = http.client.HTTPSConnection(urlsplit(url).netloc, context=context, timeout=60)
        number = 0
        while len(versions) < 2:
            assert time.monotonic() < deadline, f"{url} does not answer with both versions"
            number += 1
            unit = {"X-Unit-ID": str(number)}
            connection.request("POST", scoring.PREDICT, json.dumps(predict_body(number)), headers | unit)
            response = connection.getresponse()
            content = json.loads(response.read())
            if response.status == 200:
                versions.add(content["model_version"])
        connection.close()


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
