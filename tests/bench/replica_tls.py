"""`make bench BENCH=replica_tls`: cost of TLS between the edge and a replica, beside plain HTTP on loopback.

One edge sends the same requests to two servers in turns: one speaks plain HTTP on loopback, one TLS on an address of
this machine's network, as replicas of a cluster with several nodes do. Both answer 300 bytes without a model, so the
figures are the cost of the connection alone. `c16`: CPU time per request of the edge and of the server, with 16
connections that stay open. `idle`: CPU time per second for health checks alone.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from starlette.responses import Response

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.security.tls.certificates import write_node_certificate
from serve_apps.replica.one_write import answer_in_one_write
from tests.bench._load import Target, has_wrk, measure
from tests.servers.edge import PREDICT, Edge, running_edge
from tests.servers.polling import wait_until
from tests.servers.ports import find_network_address
from tests.servers.replica import served

TURNS, SECONDS, IDLE_S, CONNECTIONS = 5, 4, 10.0, 16
PATIENT_MS = 10_000
CONTENT = json.dumps({"predictions": [{"probability": 0.5}], "padding": "x" * 250}).encode()


class Cost(NamedTuple):
    """CPU time in microseconds."""

    edge_us: float
    replica_us: float


class Server(NamedTuple):
    """A running server."""

    address: str
    process: psutil.Process


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Read the request, and answer."""
    while (await receive()).get("more_body"):
        pass
    await Response(CONTENT, media_type="application/json")(scope, receive, send)


def serve(host: str, certificates: Path | None, pipe: Connection) -> None:
    """Run a server until the other side closes the pipe."""
    answer_in_one_write()
    with served(application, host=host, certificates=certificates) as address:
        pipe.send(address)
        pipe.poll(None)


@contextmanager
def running_server(host: str, certificates: Path | None) -> Iterator[Server]:
    """Run a server in a process of its own, as a replica does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(host, certificates, theirs), daemon=True)
    process.start()
    try:
        yield Server(ours.recv(), psutil.Process(process.pid))
    finally:
        process.kill()
        process.join()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def use(edge: Edge, server: Server) -> psutil.Process:
    """Send the edge's requests to a server, and return the process of HAProxy's worker."""
    names = ("m-v1", "m-v2", "outcomes", "features")
    patient = replace(edge.settings, hang_ms=PATIENT_MS)  # on a busy machine, too, no check may fail
    edge.load_targets(dict.fromkeys(names, (server.address,)), settings=patient)
    wait_until(lambda: edge.call(token=edge.token())[0] == 200)
    return psutil.Process(int(edge.ask("show info").split("\nPid: ")[1].split()[0]))


def under_load(edge: Edge, server: Server, *, wrk: bool) -> Cost:
    """Return the CPU time per request."""
    worker = use(edge, server)
    headers = {"Authorization": f"Bearer {edge.token()}"}
    target = Target(url=f"{edge.url}{PREDICT}", requests=[(headers, b"{}")])
    before = cpu_s(worker), cpu_s(server.process)
    load = measure(target, connections=CONNECTIONS, seconds=SECONDS, wrk=wrk)
    requests = load.requests_per_s * SECONDS
    return Cost(
        *(
            1e6 * (cpu_s(each) - was) / requests
            for each, was in zip((worker, server.process), before, strict=True)
        )
    )


def at_rest(edge: Edge, server: Server) -> Cost:
    """Return the CPU time per second of the health checks of two versions and two applications."""
    worker = use(edge, server)
    before = cpu_s(worker), cpu_s(server.process)
    time.sleep(IDLE_S)
    return Cost(
        *(
            1e6 * (cpu_s(each) - was) / IDLE_S
            for each, was in zip((worker, server.process), before, strict=True)
        )
    )


def main() -> None:
    """Measure and write the results."""
    host = find_network_address()
    if host is None:
        print("this machine has no address but loopback, so TLS to a replica is not measured")
        return
    wrk, results = has_wrk(), []
    with tempfile.TemporaryDirectory() as name, running_edge(Path(name) / "edge") as edge:
        folder = Path(name) / "node"
        write_node_certificate(folder, authority=Path(edge.places.tls), name="n", addresses=[host])
        with running_server("127.0.0.1", None) as plain, running_server(host, folder) as tls:
            servers = {"plain": plain, "falaj": tls}
            turns = [
                {system: under_load(edge, server, wrk=wrk) for system, server in servers.items()}
                for _ in range(TURNS)
            ]
            idle = {system: at_rest(edge, server) for system, server in servers.items()}
    loaded = {
        system: Cost(
            *(statistics.median(values) for values in zip(*(turn[system] for turn in turns), strict=True))
        )
        for system in servers
    }
    for case, costs, unit in (("c16", loaded, "us/request"), ("idle", idle, "us/s")):
        for system, cost in costs.items():
            print(f"{case:5} {system:6} edge {cost.edge_us:.0f}, replica {cost.replica_us:.0f} {unit}")
            results += [
                {"system": system, "case": case, "metric": metric, "value": value, "unit": unit}
                for metric, value in cost._asdict().items()
            ]
    output = Path(".falaj/bench/replica_tls.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
