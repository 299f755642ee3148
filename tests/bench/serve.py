"""`make bench BENCH=serve`: requests through the edge, against other ways to serve a small model.

All systems run on this machine during the whole benchmark, and are measured in turns. Cases: 16 connections and one
connection. Systems:
`falaj`: through the edge, with TLS, a token, a sticky split between two versions, features read online, and one record
per answer.
`falaj_direct`: the requests go directly to one replica of `falaj`, without the edge.
`fastapi`: plain FastAPI and uvicorn.
`ray_serve_ab`: an ingress of Ray Serve that awaits the handle of one of two models and does the same work, without TLS.
`ray_serve_ab_bare`: such an ingress that only predicts.

Ray Serve runs in its fastest mode: optimised for throughput, with requests sent directly to the ingress replica.
Serve's own HAProxy would only add time. The benchmark makes a new project in a temporary folder with its own ports.

    SECONDS=2 ROUNDS=3 makes a shorter run. WEIGHT=10 gives the second version 10 % of the units, like the first step of
    a rollout, not 50 %.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from _load import Measured, Target, has_wrk, measure

from tests.integration.conftest import Project
from tests.projects import scoring
from tests.servers.ports import free_port

SECONDS, ROUNDS = int(os.environ.get("SECONDS", "4")), int(os.environ.get("ROUNDS", "5"))
WEIGHT = float(os.environ.get("WEIGHT", "50"))
"""Percentage of the units that the second version answers."""
CASES = {"c16": 16, "c1": 1}
PEERS = Path(__file__).resolve().parent / "peers"
UNITS, NUM_PORTS = 512, 20
UNITS_OF = {"requests_per_s": "1/s", "p50_ms": "ms", "p99_ms": "ms"}
AIMS = (
    ("requests/s, falaj / ray_serve_ab", "c16", "requests_per_s", "ray_serve_ab", "at least 3"),
    ("requests/s, falaj / fastapi", "c16", "requests_per_s", "fastapi", "at least 0.3"),
    ("p99, falaj / falaj_direct", "c16", "p99_ms", "falaj_direct", "at most 1.2"),
)


@contextlib.contextmanager
def running_peer(script: str, folder: Path, **environment: str) -> Iterator[None]:
    """Run another server, and terminate it at the end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, str(PEERS / script), environment["PORT"], str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=inherited | environment,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def ray_environment(project: Project, first: int) -> dict[str, str]:
    """Return the environment for the peer, which has its own Ray and uses the project's store and keys.

    The ports of the peer's replicas begin at `first`.
    """
    known = {"FALAJ_CLUSTER_RECORD", "FALAJ_PROJECT_ROOT"}
    return {
        **{name: value for name, value in project.env.items() if name in known},
        "PORT": str(free_port()),
        "BENCH_STORAGE_ROOT": str(project.storage_root),
        "BENCH_WEIGHT": str(WEIGHT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_worker_niceness": "0",  # the same as for Falaj and FastAPI
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + NUM_PORTS - 1),
    }


def wait_for(url: str) -> bytes:
    """Wait until a starting server answers, and return its answer."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return bytes(response.read())
        except urllib.error.HTTPError:
            return b""
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ingress_ports(first: int) -> dict[str, int]:
    """Return the ports of the two Ray Serve ingresses, by name of the application."""
    found: dict[str, int] = {}
    for port in (first, first + 1):
        [app] = json.loads(wait_for(f"http://127.0.0.1:{port}/-/routes")).values()
        found[app] = port
    return found


def targets(project: Project, fastapi: int, ray: dict[str, int]) -> dict[str, Target]:
    """Return the URL and the requests of each system.

    Each call makes a new token, because a token expires before the benchmark ends.
    """
    token = project.token()
    units = [{"X-Unit-ID": str(unit)} for unit in range(UNITS)]
    by_key = [
        (unit | {"Authorization": f"Bearer {token}"}, _json({"entities": [{"account_id": number}]}))
        for number, unit in enumerate(units)
    ]
    inputs = scoring.features()
    by_value = [(unit, _json({"x": inputs[number].tolist()})) for number, unit in enumerate(units)]
    app = f"{scoring.MODEL}-v1"
    config = (project.storage_root / "edge" / "haproxy.cfg").read_text()
    [address] = re.findall(rf"backend {app}\n[\s\S]*?\n    server \S+ (\S+) ", config)
    return {
        "falaj": Target(url=f"{project.edge_url}{scoring.PREDICT}", requests=by_key),
        "falaj_direct": Target(url=f"http://{address}/{app}{scoring.PREDICT}", requests=by_key),
        "fastapi": Target(url=f"http://127.0.0.1:{fastapi}/predict", requests=by_value),
        "ray_serve_ab": Target(url=f"http://127.0.0.1:{ray['same']}/same", requests=by_key),
        "ray_serve_ab_bare": Target(url=f"http://127.0.0.1:{ray['bare']}/bare", requests=by_value),
    }


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def measured(project: Project, fastapi: int, ray: dict[str, int], *, wrk: bool) -> Iterator[dict[str, Any]]:
    """Measure the systems in turns. Yield the medians over the rounds; one warm-up round is not counted."""
    for case, connections in CASES.items():
        turns: dict[str, list[Measured]] = {}
        for number in range(ROUNDS + 1):
            for system, target in targets(project, fastapi, ray).items():
                turn = measure(target, connections=connections, seconds=SECONDS if number else 1, wrk=wrk)
                if number:
                    turns.setdefault(system, []).append(turn)
        for system, of_system in turns.items():
            for metric, unit in UNITS_OF.items():
                value = statistics.median(getattr(turn, metric) for turn in of_system)
                yield {"system": system, "case": case, "metric": metric, "value": value, "unit": unit}


def show(results: list[dict[str, Any]]) -> None:
    """Print a table of the results, and each ratio with the value that it should reach."""
    values = {(one["case"], one["metric"], one["system"]): one["value"] for one in results}
    print(f"{'':20}" + "".join(f"{case:>10} req/s {'p50':>7} {'p99':>7} ms" for case in CASES))
    for system in dict.fromkeys(one["system"] for one in results):
        row = ""
        for case in CASES:
            rate, p50, p99 = (values[case, metric, system] for metric in UNITS_OF)
            row += f"{rate:>16.0f} {p50:>7.2f} {p99:>7.2f}   "
        print(f"{system:20}{row}")
    for what, case, metric, peer, aim in AIMS:
        ratio = values[case, metric, "falaj"] / values[case, metric, peer]
        print(f"{case:4} {what:34} {ratio:5.2f}   aim {aim}")
    print(f"c1   p50 of falaj, ms                   {values['c1', 'p50_ms', 'falaj']:5.2f}   aim below 1.5")


def main() -> None:
    """Measure and write the results."""
    wrk = has_wrk()
    fastapi, first = (
        free_port(),
        random.randrange(32_000, 32_600, NUM_PORTS),
    )  # above the ports that `free_port` returns
    with ExitStack() as stack:
        project = stack.enter_context(scoring.running_project(weight=WEIGHT))
        folder = project.root / "model-0"
        stack.enter_context(running_peer("serve_fastapi.py", folder, PORT=str(fastapi)))
        stack.enter_context(running_peer("serve_ab.py", folder, **ray_environment(project, first)))
        wait_for(f"http://127.0.0.1:{fastapi}/")
        results = list(measured(project, fastapi, ingress_ports(first), wrk=wrk))
    show(results)
    output = Path(".falaj/bench/serve.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
