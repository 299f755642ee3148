"""`make bench BENCH=starts`: the time of commands on a small input, and from an empty cluster to two serving versions.

Each command is a new Python process in a new project. The floor of a command is its time if nothing is left to do. The
parts of a floor: `python` (start of the interpreter), `import` (the command's modules), `configuration` (Hydra), and
`work` (the rest). `deploy` has one part more: `attach`, until the process is a Ray driver.

`all_serving` is the time from the end of `cluster.up` until both versions answer: deploy, start a rollout, and send
requests until each version has answered. The models are trained before, so their training is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.storage import write_bytes
from tests.integration.conftest import Project, new_project
from tests.projects import loan

TURNS = 5
APPLY = ("feature_jobs.apply", "definitions=loans")
DEPLOY = ("serve_apps.deploy", "name=loan", "version=1")
ATTACH = (
    "from cluster.entrypoint import compose_platform as c; from cluster.session import attach; attach(c(()))"
)


def seconds(work: Callable[[], object]) -> float:
    """Return the time of a call in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prepare(project: Project) -> None:
    """Make two model versions, and deploy none."""

    loan.register(project)
    project.run("jobs.train", *loan.TRAIN, check=True)


def start_serving(project: Project) -> dict[str, float]:
    """Deploy both versions, start a rollout, and wait until both answer. Return the seconds of each step."""
    steps = {
        "deploy first": lambda: project.run_python("-m", *DEPLOY, check=True),
        "deploy second": lambda: project.run_python(
            "-m", "serve_apps.deploy", "name=loan", "version=2", "variant=challenger", check=True
        ),
        "rollout start": lambda: project.run_python(
            "-m", "serve_apps.rollout", "action=start", "name=loan", "version=2", "weight=50", check=True
        ),
        "both answer": lambda: wait_for_answers(loan.Shop(project)),
    }
    return {name: seconds(step) for name, step in steps.items()}


def wait_for_answers(shop: loan.Shop) -> None:
    """Send requests until both versions have answered. No request may fail."""
    answered: set[str] = set()
    for customer in range(loan.NUM_CUSTOMERS):
        status, content = shop.predict(customer)
        assert status == 200, content
        answered.add(content["model_version"])
        if len(answered) == 2:
            return
    raise AssertionError(f"only versions {answered} answered")


def floors(project: Project, command: tuple[str, ...], *, attaches: bool = False) -> dict[str, float]:
    """Return the medians of a command's time and of its parts, in seconds."""
    module = command[0]
    cumulative = {
        "python": ("-c", "pass"),
        "import": ("-c", f"import {module}"),
        "configuration": ("-m", *command, "--cfg", "job"),
        **({"attach": ("-c", f"import {module}; {ATTACH}")} if attaches else {}),
        "whole": ("-m", *command),
    }
    took: dict[str, list[float]] = {name: [] for name in cumulative}
    for _ in range(TURNS):
        for name, arguments in cumulative.items():
            took[name].append(seconds(lambda: project.run_python(*arguments, check=True)))  # noqa: B023
    medians = {name: statistics.median(times) for name, times in took.items()}
    before, parts = 0.0, {}
    for name, value in medians.items():
        parts["work" if name == "whole" else name] = value - before
        before = value
    return {"whole": medians["whole"], **parts}


def measure(project: Project) -> list[dict[str, Any]]:
    """Measure the start of a cluster, the first deployments and the floors."""
    figures = {("cluster", "up"): seconds(project.up)}
    prepare(project)
    serving = start_serving(project)
    figures |= {("all_serving", name): value for name, value in serving.items()}
    figures["all_serving", "whole"] = sum(serving.values())
    figures |= {("apply", name): value for name, value in floors(project, APPLY).items()}
    figures |= {("deploy", name): value for name, value in floors(project, DEPLOY, attaches=True).items()}
    figures["cluster", "status"] = seconds(lambda: project.run_python("-m", "cluster.status", check=True))
    return [
        {"system": "falaj", "case": case, "metric": metric, "value": value, "unit": "s"}
        for (case, metric), value in figures.items()
    ]


def main() -> None:
    """Measure, print and write the figures."""
    with tempfile.TemporaryDirectory(prefix="falaj-") as folder:
        project = new_project(Path(folder) / "project")
        try:
            rows = measure(project)
        finally:
            down = seconds(lambda: project.run_python("-m", "cluster.down", check=True))
    rows.append({"system": "falaj", "case": "cluster", "metric": "down", "value": down, "unit": "s"})
    for row in rows:
        print(f"{row['case']:12} {row['metric']:14} {row['value']:7.2f} s", flush=True)
    target = Path(".falaj/bench/starts.json")
    write_bytes(str(target.absolute()), json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
