"""`make bench BENCH=burst`: ten times the load for 30 s, on a version that scales between one and three replicas.

A client sends requests at a constant rate through the edge, also while answers are slow. The phases are: the base rate,
ten times the base rate, and the base rate again. In the phase `limited`, a principal sends ten times the base rate, and
its own limit is twice the base rate. No request may fail: each gets 200, or 429 above a limit of its principal.

    PER_S=20 SECONDS=10 sets the base rate and the length of the burst. With CONNECTIONS=0, the client opens as many
    connections as it has open requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.clients.balanced_load import BalancedLoad, Kind, Sent
from tests.clients.load import percentile
from tests.clients.serve_status import running_replicas
from tests.integration.conftest import Project
from tests.projects import scoring
from tests.servers.polling import wait_until

PER_S, SECONDS = float(os.environ.get("PER_S", "60")), float(os.environ.get("SECONDS", "30"))
BURST_FACTOR = 10
CONNECTIONS = int(os.environ.get("CONNECTIONS", "256"))
"""Connections of the client. The edge closes more than 500 of one address."""
APP = f"{scoring.MODEL}-v1"
LIMITED, LIMIT_PER_S = "limited", round(2 * PER_S)
SCALING = (
    "replica.num_replicas=null",
    "replica.min_replicas=1",
    "replica.max_replicas=3",
    "replica.target_ongoing_requests=0.2",
    "replica.upscale_delay_s=1",
    "replica.downscale_delay_s=5",
    "replica.look_back_s=3",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the table."""

    metric: str
    title: str
    width: int = 8
    digits: int = 0
    """Digits after the decimal point."""


COLUMNS = (
    Column(metric="sent", title="sent"),
    Column(metric="answered", title="answered", width=10),
    Column(metric="refused_429", title="429"),
    Column(metric="failed", title="failed"),
    Column(metric="p50_ms", title="p50 ms", width=9, digits=1),
    Column(metric="p99_ms", title="p99 ms", width=9, digits=1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A constant rate for some seconds."""

    name: str
    per_s: float
    seconds: float
    principal: str = "tester"


PHASES = (
    Phase(name="before", per_s=PER_S, seconds=10),
    Phase(name="burst", per_s=BURST_FACTOR * PER_S, seconds=SECONDS),
    Phase(name="after", per_s=PER_S, seconds=20),
    Phase(name="limited", per_s=BURST_FACTOR * PER_S, seconds=10, principal=LIMITED),
)


@dataclass(kw_only=True)
class Replicas:
    """Context manager that counts the running replicas twice a second."""

    project: Project
    counts: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and number of replicas; one entry for each change."""
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Replicas:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stopped.wait(0.5):
            with contextlib.suppress(OSError):  # the dashboard may be slow in a burst
                count = len(running_replicas(self.project.record, APP))
                if not self.counts or self.counts[-1][1] != count:
                    self.counts.append((time.monotonic() - began, count))


def send(project: Project, phase: Phase) -> list[Sent]:
    """Send the requests of a phase, and return their results."""
    token = project.token(subject=phase.principal)

    def body(number: int) -> dict[str, Any]:
        return {"entities": [{"account_id": number % scoring.ACCOUNTS}]}

    def headers(number: int) -> dict[str, str]:
        return {"Authorization": f"Bearer {token}", "X-Unit-ID": str(number)}

    load = BalancedLoad(
        servers={"edge": project.edge_url},
        health_path="/v2/health/ready",
        kinds={phase.name: Kind(path=scoring.PREDICT, per_s=phase.per_s, body=body)},
        headers=headers,
        authority=str(project.storage_root / "tls" / "ca.pem"),
        connections=CONNECTIONS,
    )
    with load:
        time.sleep(phase.seconds)
    return load.sent


def measure(project: Project) -> Iterator[dict[str, Any]]:
    """Run the phases, print a table, and yield the figures."""
    titles = "".join(f"{column.title:>{column.width}}" for column in COLUMNS)
    print(f"{'':10}{titles}  replicas")
    for phase in PHASES:
        with Replicas(project=project) as replicas:
            sent = send(project, phase)
        statuses = Counter(one.status for one in sent)
        took = [one.took_s * 1e3 for one in sent if one.is_good]
        figures = {
            "sent": len(sent),
            "answered": statuses[200],
            "refused_429": statuses[429],
            "failed": len(sent) - statuses[200] - statuses[429],
            "p50_ms": percentile(took, 50),
            "p99_ms": percentile(took, 99),
            "replicas": max(count for _, count in replicas.counts),
        }
        over_time = ", ".join(f"{count} at {at:.0f} s" for at, count in replicas.counts)
        row = "".join(f"{figures[column.metric]:>{column.width}.{column.digits}f}" for column in COLUMNS)
        print(f"{phase.name:10}{row}  {over_time}", flush=True)
        for one in [one for one in sent if one.status not in (200, 429)][:5]:
            print(f"    failed after {one.took_s:.2f} s: {one.status} {one.content}")
        for metric, value in figures.items():
            unit = "ms" if metric.endswith("_ms") else "1"
            yield {"system": "falaj", "case": phase.name, "metric": metric, "value": value, "unit": unit}


def main() -> None:
    """Measure and write the results. Exit with 1 if a request failed."""
    with scoring.new_cluster() as project:
        scoring.prepare(project, versions=1)
        project.run("serve_apps.deploy", f"name={scoring.MODEL}", "version=1", *SCALING, check=True)
        project.run(
            "serve_apps.edge.limits", f"principal={LIMITED}", f"requests_per_s={LIMIT_PER_S}", check=True
        )
        wait_until(lambda: len(running_replicas(project.record, APP)) == 1, "one replica", seconds=60)
        print(f"base rate {PER_S:.0f}/s, burst {BURST_FACTOR * PER_S:.0f}/s for {SECONDS:.0f} s")
        results = list(measure(project))
    output = Path(".falaj/bench/burst.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))
    failed = sum(one["value"] for one in results if one["metric"] == "failed")
    if failed:
        sys.exit(f"{failed:.0f} requests failed")


if __name__ == "__main__":
    main()
