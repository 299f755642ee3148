"""`make bench BENCH=rollout`: time of a weight change, from the append of its event until every edge has applied it.

It is what a command waits for: 200 changes, each after the one before. Cases: one edge with SQLite, and one and three
edges with PostgreSQL, which run in processes of their own with a real HAProxy each. Without PostgreSQL only the first
case runs. There is no peer: Ray Serve has no weights.

Cases `sqlite_load` and `postgresql_load` have eight busy connections (`tests/bench/_rollout_load.py`): the time from
the append of a rollback until the last request of the version that is rolled back, of a running rollout and after a
promotion; the number of lost requests; and the requests per second with the controller of rollouts and the counting of
access records, divided by those without, in alternating turns. `LOAD=0` leaves them out, and `LOAD=1` measures nothing
else.

`NODES=3` measures a whole cluster of three nodes instead, in network namespaces, with PostgreSQL, Redis and a double of
S3: the time until it runs, the time from `deploy` until both versions of a model answer at each of the three edges, and
all this for a node with a slow link (`LINK=2mbit`). It needs root.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.ledger import Ledger
from cluster.ledger.database import is_shared
from cluster.ledger.events import RolloutWeightChanged
from cluster.settings import PlatformConfig, StorageConfig
from serve_apps.edge.control.live_edges import ensure_table, read_edges
from serve_apps.edge.control.waiting import wait_until_applied
from tests.samples.rollouts import DEPLOYED, STARTED
from tests.servers.controller import new_controller
from tests.servers.polling import wait_until
from tests.servers.postgresql import is_installed, running_server

CHANGES, PAUSE_S, START_S = 200, 0.02, 60.0


def run_edge(root: str, url: str, stopped: Event) -> None:
    """Run an edge until it is stopped."""
    with new_controller(Path(root), ledger=Ledger(url)) as edge:
        edge.thread.start()
        stopped.wait()


def wait_for_edges(ledger: Ledger, config: PlatformConfig, num_edges: int) -> None:
    """Wait until all edges are live and serve."""

    def num_live() -> int:
        with ledger.engine.connect() as connection:
            return sum(edge.is_live for edge in read_edges(connection))

    if is_shared(ledger.engine):
        ensure_table(ledger)
        wait_until(lambda: num_live() == num_edges, "all edges", seconds=START_S)
    wait_until_applied(config, ledger, ledger.head(), app="m-v2")


def measure(folder: Path, url: str, *, num_edges: int) -> list[float]:
    """Return the seconds that each change took."""
    config = PlatformConfig(storage=StorageConfig(root=str(folder)))
    ledger = Ledger(url)
    for event in (*DEPLOYED, STARTED):
        ledger.append(event, actor="bench")
    context = multiprocessing.get_context("spawn")
    stopped = context.Event()
    roots = [folder / name for name in ("edge", "edge2", "edge3")[:num_edges]]
    edges = [context.Process(target=run_edge, args=(str(root), url, stopped)) for root in roots]
    for edge in edges:
        edge.start()
    try:
        wait_for_edges(ledger, config, num_edges)
        names = {"model": STARTED.model, "rollout": STARTED.rollout}
        return [change_weight(config, ledger, weight=1 + number % 40, **names) for number in range(CHANGES)]
    finally:
        stopped.set()
        for edge in edges:
            edge.join()
        ledger.close()


def change_weight(
    config: PlatformConfig, ledger: Ledger, *, weight: float, model: str, rollout: str
) -> float:
    """Change the weight, and return the seconds until every edge has applied it."""
    began = time.perf_counter()
    event = RolloutWeightChanged(model=model, rollout=rollout, weight=weight)
    wait_until_applied(config, ledger, ledger.append(event, actor="bench").seq)
    taken = time.perf_counter() - began
    time.sleep(PAUSE_S)
    return taken


def measure_processes(folder: Path, stack: ExitStack) -> dict[str, list[float]]:
    """Return the seconds of each change by case, with edges that are processes of this machine."""
    cases = {"sqlite_1": (f"sqlite:///{folder}/ledger.db", 1)}
    if is_installed():
        for num_edges in (1, 3):
            cases[f"postgresql_{num_edges}"] = (stack.enter_context(running_server()), num_edges)
    else:
        print("PostgreSQL is not installed, so several edges are not measured")
    measured = {}
    for case, (url, num_edges) in cases.items():
        (folder / case).mkdir()
        measured[case] = measure(folder / case, url, num_edges=num_edges)
    return measured


def describe(case: str, seconds: list[float]) -> list[dict[str, object]]:
    """Print the percentiles of a case, and return them as results."""
    taken_ms = 1000 * np.array(seconds)
    p50, p99 = np.percentile(taken_ms, (50, 99))
    print(f"{case:25} p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {taken_ms.max():.1f} ms")
    return [result(case, "p50_ms", float(p50)), result(case, "p99_ms", float(p99))]


def result(case: str, metric: str, value: float) -> dict[str, object]:
    """Return one result; its metric ends with its unit."""
    return {
        "system": "falaj",
        "case": case,
        "metric": metric,
        "value": value,
        "unit": metric.rpartition("_")[2],
    }


def measure_load(folder: Path, stack: ExitStack) -> list[dict[str, object]]:
    """Print and return the results under load, with each database."""
    from tests.bench._rollout_load import measure_under_load

    urls = {"sqlite": f"sqlite:///{folder}/ledger.db"}
    if is_installed():
        urls["postgresql"] = stack.enter_context(running_server())
    results = []
    for name, url in urls.items():
        measured, case = measure_under_load(folder / name, url), f"{name}_load"
        for kind, seconds in (("rollback", measured.rollback_s), ("promoted", measured.promoted_s)):
            taken_ms = 1000 * np.array(seconds)
            values = (*np.percentile(taken_ms, (50, 95)), taken_ms.max())
            results += [
                result(case, f"{kind}_{part}_ms", float(value))
                for part, value in zip(("p50", "p95", "max"), values, strict=True)
            ]
        ratio = float(np.median(measured.ratios))
        results += [
            result(case, "lost_requests", measured.lost),
            result(case, "sent_requests", measured.requests),
            result(case, "with_controller_per_s", measured.requests_per_s),
            result(case, "with_to_without_controller_ratio", ratio),
        ]
        print("\n".join(f"{one['case']:20} {one['metric']:34} {one['value']:.3f}" for one in results[-10:]))
        print(f"{case:20} ratios of the turns: {', '.join(f'{one:.3f}' for one in measured.ratios)}")
    return results


def main() -> None:
    """Measure and write the results."""
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if os.environ.get("NODES") == "3":
            from tests.bench._three_nodes import measure_three_nodes

            figures = measure_three_nodes(folder)
            for case, seconds in figures.many.items():
                results += describe(f"three_nodes_{case}", seconds)
            results += [result("three_nodes", metric, value) for metric, value in figures.once.items()]
        else:
            if os.environ.get("LOAD") != "1":
                for case, changes in measure_processes(folder, stack).items():
                    results += describe(case, changes)
            if os.environ.get("LOAD") != "0":
                (folder / "load").mkdir()
                results += measure_load(folder / "load", stack)
    output = Path(".falaj/bench/rollout.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    try:
        main()
    except pytest.skip.Exception as reason:  # from the servers of the tests
        print(reason, file=sys.stderr)
        sys.exit(2)
