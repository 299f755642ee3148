"""`make bench BENCH=sweep`: serving at 100 requests/s while a sweep runs, and a sweep while serving answers.

Three cases are measured in turns: `serving` (the sweep's processes are stopped by SIGSTOP), `sweep` (no requests), and
`both`. Serving is measured by its latency at the edge, the sweep by the reports of its trials per second. The aims: the
p99 is at most 1.2 times that without the sweep, and the sweep is at least half as fast as without requests.

As root, the benchmark runs in a control group for CPU time of its own, like a service of systemd or a container. With
GROUP=0 it does not. Then the kernel may divide time between sessions before it looks at priorities.

    SECONDS=5 ROUNDS=2 makes a shorter run. PER_S=50 sets the rate of requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.host import processes
from cluster.ledger.events import TrialReported
from tests.bench._group import own_group
from tests.clients.balanced_load import BalancedLoad, Kind
from tests.clients.load import percentile
from tests.integration.conftest import Project
from tests.projects import scoring
from tests.servers.polling import wait_until

SECONDS, ROUNDS = float(os.environ.get("SECONDS", "15")), int(os.environ.get("ROUNDS", "5"))
PER_S = float(os.environ.get("PER_S", "100"))
ROWS, COLUMNS = 30_000, 12
CASES = ("serving", "both", "sweep")
CONCURRENT = 2
RUN = "bench"
SWEEP = (
    "name=background",
    "training_set=rows.parquet",
    "label=y",
    f"run={RUN}",
    "sweep.trials=100",
    f"sweep.concurrent_trials={CONCURRENT}",
    "sweep.trial_deadline_s=3600",
    "sweep.model.epochs=1000",
)
UNITS = {"p50_ms": "ms", "p99_ms": "ms", "failed": "1", "reports_per_s": "1/s"}


def write_rows(path: Path) -> None:
    """Write a training set."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(ROWS, COLUMNS))
    label = (values.sum(axis=1) + draw.normal(size=ROWS) > 0).astype(np.int64)
    columns = {f"x{number}": column for number, column in enumerate(values.T)}
    pq.write_table(pa.table({"row_id": np.arange(ROWS), **columns, "y": label}), path)


class Sweep:
    """A sweep that runs for as long as the benchmark, and can be stopped meanwhile."""

    def __init__(self, project: Project, job: subprocess.Popen[bytes]) -> None:
        self._project, self._job, self._ledger = project, job, project.ledger()

    def num_reports(self) -> int:
        """Return how many reports its trials have made."""
        return sum(1 for _ in self._ledger.find(TrialReported, model="background", run=RUN))

    def processes(self) -> list[psutil.Process]:
        """Return the command's process and the processes of its trials. The latter have the lowest priority."""
        found = []
        for process in processes.find(self._project.record.cluster_id):
            with contextlib.suppress(ProcessLookupError):
                if os.sched_getscheduler(process.pid) == os.SCHED_IDLE:
                    found.append(process)
        return [psutil.Process(self._job.pid), *found]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def running_sweep(project: Project) -> Iterator[Sweep]:
    """Run a sweep until the end of the block."""
    write_rows(project.root / "rows.parquet")
    command = [sys.executable, "-m", "jobs.sweep", *SWEEP]
    with subprocess.Popen(command, cwd=project.root, env=project.env, stdout=subprocess.DEVNULL) as job:
        sweep = Sweep(project, job)
        try:
            wait_until(lambda: sweep.num_reports() > 4 * CONCURRENT or job.poll() is not None, seconds=180)
            yield sweep
        finally:
            sweep.send(signal.SIGCONT)
            job.kill()


def turn(project: Project, sweep: Sweep, case: str) -> dict[str, float]:
    """Measure one case for some seconds."""
    sweep.send(signal.SIGSTOP if case == "serving" else signal.SIGCONT)
    time.sleep(1)
    load = requests(project) if case != "sweep" else None
    before, began = sweep.num_reports(), time.monotonic()
    with load or contextlib.nullcontext():
        time.sleep(SECONDS)
    figures = {"reports_per_s": (sweep.num_reports() - before) / (time.monotonic() - began)}
    if load is not None:
        took = [one.took_s * 1e3 for one in load.sent if one.is_good]
        figures |= {"p50_ms": percentile(took, 50), "p99_ms": percentile(took, 99)}
        figures["failed"] = len(load.sent) - len(took)
    sweep.send(signal.SIGCONT)
    return figures


def requests(project: Project) -> BalancedLoad:
    """Return a client that sends requests at a constant rate."""
    token = project.token()
    return BalancedLoad(
        servers={"edge": project.edge_url},
        health_path="/v2/health/ready",
        kinds={"predict": Kind(path=scoring.PREDICT, per_s=PER_S, body=body)},
        headers=lambda number: {"Authorization": f"Bearer {token}", "X-Unit-ID": str(number)},
        authority=str(project.storage_root / "tls" / "ca.pem"),
        connections=64,
    )


def body(number: int) -> dict[str, Any]:
    return {"entities": [{"account_id": number % scoring.ACCOUNTS}]}


def measured(project: Project, sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Measure the cases in turns. Yield the medians over the rounds; one warm-up round is not counted."""
    turns: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for number in range(ROUNDS + 1):
        for case in CASES[number % 3 :] + CASES[: number % 3]:
            figures = turn(project, sweep, case)
            print(
                f"  {case:8} " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()),
                flush=True,
            )
            if number:
                turns[case].append(figures)
    for case, of_case in turns.items():
        for metric in of_case[0]:
            value = statistics.median(figures[metric] for figures in of_case)
            yield {
                "system": "falaj",
                "case": case,
                "metric": metric,
                "value": value,
                "unit": UNITS[metric],
            }


def main() -> None:
    """Measure and write the results."""
    with own_group(), scoring.new_cluster() as project:
        scoring.prepare(project, versions=1)
        fixed = "replica.num_replicas=1"
        project.run("serve_apps.deploy", f"name={scoring.MODEL}", "version=1", fixed, check=True)
        with running_sweep(project) as sweep:
            results = list(measured(project, sweep))
    values = {(one["case"], one["metric"]): one["value"] for one in results}
    for metric in ("p50_ms", "p99_ms"):
        alone, both = values["serving", metric], values["both", metric]
        print(f"{metric}: {alone:.2f} without the sweep, {both:.2f} with it: {both / alone:.2f} times")
    alone, both = values["sweep", "reports_per_s"], values["both", "reports_per_s"]
    print(
        f"reports/s of the sweep: {alone:.2f} without requests, {both:.2f} with them: {both / alone:.2f} times"
    )
    print("aims: p99 at most 1.2 times, reports/s at least 0.5 times")
    output = Path(".falaj/bench/sweep.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
