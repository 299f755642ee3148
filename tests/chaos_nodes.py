"""`make chaos-nodes`: failures under load on three nodes, for Falaj and then for an A/B test of Ray Serve.

It writes `.falaj/bench/chaos_nodes.json` and, from it, `docs/reliability.md`. It needs root, for network namespaces.

    FAILURES=cut,head SYSTEMS=falaj python tests/chaos_nodes.py    # only these; the report is printed and not written
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.nodes import ray_serve, workload
from tests.nodes.failures import FAILURES, VICTIM, Failure, with_movable_clock
from tests.nodes.falaj import Falaj
from tests.nodes.report import table, write_report
from tests.nodes.three_nodes import ThreeNodes, three_computers
from tests.nodes.trial import BEFORE_S, Trial, run_trial
from tests.projects import scoring

PREDICT_PER_S, PUSH_PER_S = 20.0, 4.0
OUTPUT = Path(".falaj/bench/chaos_nodes.json")
SYSTEMS = {"falaj": "Falaj", "ray_serve": "Ray Serve"}


@contextmanager
def falaj(folder: Path) -> Iterator[Falaj]:
    """Run Falaj on three nodes, with the workload."""
    with three_computers(folder, small_disk_of=VICTIM) as cluster:
        with_movable_clock(cluster.computers[VICTIM])
        cluster.up(workload.DURABILITY)
        for node in cluster.nodes:
            cluster.join(node)
        workload.prepare(cluster, versions=3)
        yield Falaj(cluster=cluster, predict_per_s=PREDICT_PER_S, push_per_s=PUSH_PER_S)


@contextmanager
def peer(folder: Path) -> Iterator[ray_serve.RayServe]:
    """Run Ray Serve on three nodes, with the same workload."""
    with three_computers(folder, small_disk_of=VICTIM) as cluster:
        with_movable_clock(cluster.computers[VICTIM])
        with ray_serve.running(cluster, predict_per_s=PREDICT_PER_S, push_per_s=PUSH_PER_S) as system:
            yield system


def chosen() -> list[Failure]:
    """Return the failures that the environment names, by default all."""
    names = os.environ.get("FAILURES", ",".join(failure.name for failure in FAILURES)).split(",")
    return [failure for failure in FAILURES if failure.name in names]


def measure(system: Falaj | ray_serve.RayServe, failure: Failure) -> dict[str, Any]:
    """Let one failure happen, and return its figures."""
    trial = run_trial(system, failure, system.load(), per_s=system.per_s)
    keep_requests(trial, OUTPUT.parent / "chaos_nodes" / f"{type(system).__name__}_{failure.name}.csv")
    figures = {**asdict(trial.outcome), "repair_s": trial.repair_s, **asdict(system.lost(trial.sent))}
    if failure.name == "head" and isinstance(system, Falaj):
        figures |= measure_deploy(system, failure)
    return figures


def measure_deploy(system: Falaj, failure: Failure) -> dict[str, Any]:
    """Let the head fail again, and return when another version was deployed, in seconds from the failure.

    It is a failure of its own, because a replica that starts takes so much of this machine's processor that it delays
    other answers.
    """
    failed_at, deploy_s = time.monotonic() + BEFORE_S, 0.0

    def deploy() -> None:
        """Start another version, and remove it again."""
        nonlocal deploy_s
        workload.head_of(system.cluster).run(*workload.DEPLOY_THIRD, check=True)
        deploy_s = time.monotonic() - failed_at
        remove = ("serve_apps.deploy", "action=remove", f"name={scoring.MODEL}", "version=3")
        workload.head_of(system.cluster).run(*remove, check=True)

    trial = run_trial(system, failure, system.load(), per_s=system.per_s, after=deploy)
    lost = system.lost(trial.sent)
    return {
        "deploy_s": deploy_s,
        "deploy_failed_elsewhere": trial.outcome.failed_elsewhere,
        "deploy_lost": lost.records + lost.pushes,
    }


def keep_requests(trial: Trial, path: Path) -> None:
    """Write all requests of a trial to a file, to find out when answers were late. Times are relative to the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = min(one.at for one in trial.sent)
    lines = (
        f"{one.at - first:.3f},{one.took_s:.3f},{one.server},{one.kind},{one.status}\n"
        for one in sorted(trial.sent, key=lambda one: one.at)
    )
    path.write_text("sent_s,took_s,server,kind,status\n" + "".join(lines))


def keep_logs(cluster: ThreeNodes, folder: Path) -> None:
    """Copy the logs of all computers to a folder, because their own folders are removed at the end."""
    for computer in cluster.computers.values():
        for path in (*computer.root.glob(".falaj/*/*.log"), *computer.root.glob("*.log")):
            target = folder / computer.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def main() -> int:
    """Run the failures on each system, and write the report."""
    failures = chosen()
    systems = os.environ.get("SYSTEMS", ",".join(SYSTEMS)).split(",")
    results: dict[str, dict[str, Any]] = {name: {} for name in systems}
    for name in systems:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"falaj-{name}-")))
            system: Falaj | ray_serve.RayServe
            system = (
                stack.enter_context(falaj(folder)) if name == "falaj" else stack.enter_context(peer(folder))
            )
            for failure in failures:
                print(f"{time.strftime('%T')} {SYSTEMS[name]}: {failure.text}", flush=True)
                try:
                    results[name][failure.name] = measure(system, failure)
                except Exception:  # noqa: BLE001 (what was measured so far is still written)
                    traceback.print_exc()
                    keep_logs(system.cluster, Path(".falaj/bench/chaos_nodes") / name / failure.name)
                    continue
                print(json.dumps(results[name][failure.name]), flush=True)
    print(table(results))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=1))
    if len(failures) == len(FAILURES) and len(systems) == len(SYSTEMS):
        write_report(results, Path("docs/reliability.md"), rate=PREDICT_PER_S + PUSH_PER_S)
    return int(any(each["records"] or each["pushes"] for each in results.get("falaj", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
