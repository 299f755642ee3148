"""`make chaos-pipeline`: run the demo once without a failure, and once with `kill -9` at every stage.

During one stage, the process that leads the run is killed. During the next one, the stage's own process is killed. If
the run has ended, the same command runs again, until the demo is done. Both summaries must have the same results, and
another run must have nothing to do.

    SEED=2 kills at other moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cluster.ledger.events import StageStarted
from jobs.pipeline.state import State, read_newest_run
from tests.integration.conftest import Project, new_project

DEMO = (sys.executable, "-m", "jobs.pipeline.census")
OF_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable of a job's processes. Its value has the job's id."""
LATEST_S = 3.0
"""A stage is killed at a random moment in its first seconds."""
DIFFERENT = ("seconds", "rollback_ms", "ledger", "shares", "monitor")
"""Parts of the summary that differ from run to run: times, the number of events, and what depends on the salt of the
rollout. The salt is random, and decides which requests an arm gets."""


def start(project: Project, log: Path) -> subprocess.Popen[bytes]:
    """Start the demo."""
    with log.open("ab") as file:
        return subprocess.Popen(DEMO, cwd=project.root, env=project.env, stdout=file, stderr=file)


def results(project: Project) -> dict[str, Any]:
    """Return the parts of the summary that must be the same in each run."""
    summary: dict[str, Any] = json.loads((project.storage_root / "demo" / "summary.json").read_text())
    requests = {name: value for name, value in summary["requests"].items() if not name.endswith("_ms")}
    same = {name: value for name, value in summary.items() if name not in DIFFERENT}
    return same | {"requests": requests, "monitored": monitored(summary["monitor"])}


def monitored(arms: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[int]]:
    """Return the monitored rows and outcomes of both arms together, by year."""
    totals: dict[str, list[int]] = {}
    for years in arms.values():
        for year, figures in years.items():
            rows, outcomes = totals.get(year, (0, 0))
            totals[year] = [rows + figures["rows"], outcomes + figures["outcomes"]]
    return totals


def count_stages(project: Project) -> int:
    """Return how many stages were started so far."""
    return sum(1 for _ in project.ledger().entries(StageStarted))


def running_stages(project: Project) -> list[tuple[str, str]]:
    """Return name and job of each stage that runs now."""
    run = read_newest_run(project.ledger(), "census")
    stages = {} if run is None else run.stages
    return [(name, stage.job) for name, stage in stages.items() if stage.state is State.running]


def kill_job(job: str) -> bool:
    """Kill the processes of a stage's job. Return whether there was one."""
    is_killed = False
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if job in process.environ().get(OF_JOB, "") and "-m" in process.cmdline():
                process.kill()
                is_killed = True
    return is_killed


def run_with_kills(project: Project, log: Path, moments: random.Random) -> list[str]:
    """Run the demo to its end, and kill each stage once. Return what was killed."""
    killed: dict[str, str] = {}
    demo = start(project, log)
    while True:
        if demo.poll() is not None:
            if demo.returncode == 0:
                return list(killed.values())
            demo = start(project, log)
        new = [(name, job) for name, job in running_stages(project) if name not in killed]
        if not new:
            time.sleep(0.1)
            continue
        name, job = new[0]
        time.sleep(moments.uniform(0, LATEST_S))
        if demo.poll() is not None:
            continue
        if len(killed) % 2 and kill_job(job):
            killed[name] = f"the process of {name}"
        else:
            demo.kill()
            demo.wait()
            killed[name] = f"the leader during {name}"
        print(f"{time.strftime('%T')} killed {killed[name]}", flush=True)


def main() -> int:
    """Compare the two runs."""
    moments = random.Random(int(os.environ.get("SEED", "1")))
    with tempfile.TemporaryDirectory(prefix="falaj-chaos-") as folder:
        found = {}
        for name in ("whole", "killed"):
            project, log = new_project(Path(folder) / name), Path(folder) / f"{name}.log"
            overrides = [f"cluster.ports.{port}={number}" for port, number in project.ports.items()]
            subprocess.run(
                [sys.executable, "-m", "cluster.up", *overrides],
                cwd=project.root,
                env=project.env,
                check=True,
            )
            try:
                began = time.monotonic()
                if name == "whole":
                    if start(project, log).wait():
                        print(log.read_text()[-4000:])
                        return 1
                else:
                    killed = run_with_kills(project, log, moments)
                    print(f"killed {len(killed)} times")
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
                found[name] = results(project)
                stages = count_stages(project)
                repeated = subprocess.run(
                    DEMO, cwd=project.root, env=project.env, check=False, capture_output=True, text=True
                )
                if repeated.returncode:
                    print(repeated.stdout[-4000:], repeated.stderr[-4000:], sep="\n")
                    return 1
                print(next(line for line in repeated.stdout.splitlines() if "nothing to do" in line))
                print(f"stages that another run starts: {count_stages(project) - stages}", flush=True)
            finally:
                project.run_python("-m", "cluster.down", check=True)
    different = [name for name in found["whole"] if found["whole"][name] != found["killed"][name]]
    for name in different:
        print(f"{name}: {found['whole'][name]} without a failure, {found['killed'][name]} with kills")
    print("The results differ." if different else "The results are the same.")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
