"""`make bench BENCH=serve_model`: the p99 at full load, if nothing is random except the version that a request gets.

This simulates `make bench BENCH=serve` with 16 connections as a closed queueing network. The load generator, HAProxy
and one replica of each version each process one request after another. If more of them have work than there are cores,
they share the cores evenly. The simulation uses the measured CPU time per request. It measures no times itself, so
every run prints the same. In the direct case, all requests go to one replica without HAProxy.
"""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path

import numpy as np

CONNECTIONS, REQUESTS = 16, 60_000
REPLICA_US, CLIENT_US = 265.0, 25.0
"""CPU time per request in microseconds."""
BACKGROUND = 0.12
"""Share of a core that all other processes use."""
CASES = ((2, 50, 105), (3, 50, 105), (4, 50, 105), (2, 10, 105), (2, 50, 60), (2, 50, 30))
"""Number of cores, percent of requests for the second version, HAProxy's CPU time per request in microseconds."""

Route = list[tuple[str, float]]
"""The stations of a request in order, each with its work in microseconds."""


def route(draw: random.Random, *, weight: float, edge_us: float | None) -> Route:
    """Return the route of a request: directly to the first version, or through HAProxy to a random version."""
    if edge_us is None:
        return [("client", CLIENT_US), ("first", REPLICA_US)]
    version = "second" if draw.random() < weight / 100 else "first"
    return [("client", CLIENT_US), ("edge", edge_us / 2), (version, REPLICA_US), ("edge", edge_us / 2)]


def p99_us(cores: float, *, weight: float = 0.0, edge_us: float | None = None) -> float:
    """Return the p99 of the time from sending a request until the answer is back at the load generator.

    Args:
        cores: Number of cores for all stations.
        weight: Percentage of the requests that the second version gets.
        edge_us: HAProxy's CPU time per request. None means that all requests go directly to the first version.
    """
    draw = random.Random(1)
    queues: dict[str, deque[tuple[Route, float]]] = {
        name: deque() for name in ("client", "edge", "first", "second")
    }
    left: dict[str, float] = {}
    now, took = 0.0, []

    def arrive(rest: Route, sent: float) -> None:
        name, work = rest[0]
        queues[name].append((rest, sent))
        left.setdefault(name, work)

    for _ in range(CONNECTIONS):
        arrive(route(draw, weight=weight, edge_us=edge_us), now)
    while len(took) < REQUESTS:
        done = min(left, key=left.__getitem__)
        work = left.pop(done)
        now += work / min(1.0, (cores - BACKGROUND) / (len(left) + 1))
        left = {name: others - work for name, others in left.items()}
        (_, *rest), sent = queues[done].popleft()
        if queues[done]:
            left[done] = queues[done][0][0][0][1]
        if rest:
            arrive(rest, now if done == "client" else sent)
        else:
            took.append(now - sent)
            arrive(route(draw, weight=weight, edge_us=edge_us), now)
    return float(np.percentile(took, 99))


def main() -> None:
    """Print and write the ratios."""
    results = []
    for cores, weight, edge_us in CASES:
        directly = p99_us(cores)
        ratio = p99_us(cores, weight=weight, edge_us=edge_us) / directly
        case = f"{cores} cores, {weight} % on the second version, {edge_us} us in HAProxy"
        print(f"{case:60} p99 {ratio:.2f} of a replica's own")
        results.append({"system": "model", "case": case, "metric": "p99_ratio", "value": ratio, "unit": "1"})
    output = Path(".falaj/bench/serve_model.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
