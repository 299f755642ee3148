"""Time of whole commands with a ledger of 100 events, and with a ledger of a million events.

Two projects have the same data, the same model in a rollout, and the same logs. One of their ledgers gets a long
history of other views and models. Both clusters run at the same time. Each command is a new process; it runs in both
projects in turn, and the order changes with every turn. The figures are medians. A turn that is not counted comes
first: in it, the projections and caches are filled.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench._scale_ledger import LARGE, SMALL, history
from tests.integration.conftest import Project, new_project
from tests.projects import loan
from tests.samples.many_events import load_events

TURNS = 5
START_TURNS = 3
ANSWERS = 40
NAME = "name=loan"
ROLLOUT = ("serve_apps.rollout", NAME)
COMMANDS: dict[str, tuple[str, ...]] = {
    "cluster.status": ("cluster.status",),
    "apply": ("feature_jobs.apply", "definitions=loans"),
    "apply plan": ("feature_jobs.apply", "definitions=loans", "plan=true"),
    "ingest": ("feature_jobs.ingest", "definitions=loans", "view=income"),
    "quarantine": ("feature_jobs.quarantine", "view=income"),
    "training_set": (
        "feature_jobs.training_set",
        "definitions=loans",
        "service=credit",
        "entities=customers.parquet",
        "output=again.parquet",
    ),
    "materialize": ("feature_jobs.materialize", "definitions=loans", "view=income", f"as_of={loan.AS_OF}"),
    "compact": ("feature_jobs.compact", "definitions=loans", "view=income"),
    "train": ("jobs.train", *loan.TRAIN),
    "evaluate": ("jobs.evaluate", NAME, "version=1", "training_set=loans.parquet"),
    "deploy": ("serve_apps.deploy", NAME, "version=1"),
    "deploy restore": ("serve_apps.deploy", "action=restore"),
    "rollout show": (*ROLLOUT, "action=show"),
    "rollout weight": (*ROLLOUT, "action=weight", "weight=20"),
    "rollout check": (*ROLLOUT, "action=check"),
    "limits": ("serve_apps.edge.limits", "tenant=bank", "requests_per_s=100"),
    "skew": ("feature_jobs.skew", NAME),
    "monitor": ("jobs.monitor", NAME, "reference=loans.parquet", "label=repaid", "min_rows=10"),
    "compact_log": ("jobs.compact_log", NAME),
    "lineage": ("cluster.lineage", "--model", "loan", "--version", "1"),
    "records.nodes": ("cluster.records.nodes",),
}


def prepare(project: Project) -> None:
    """Make a project with two served versions, a rollout between them, and answers with outcomes in the logs."""
    project.up()
    loan.prepare(project)
    for module, *arguments in (
        ("jobs.train", *loan.TRAIN),
        ("serve_apps.rollout", "action=start", NAME, "version=2", "weight=50"),
    ):
        project.run_python("-m", module, *arguments, check=True)
    shop = loan.Shop(project)
    for customer in range(ANSWERS):
        status, answer = shop.predict(customer)
        assert status == 200, answer
        outcome = {"prediction_id": answer["prediction_id"], "outcome": customer % 2}
        body = {"model": "loan", "outcomes": [outcome]}
        assert shop.call("/v1/outcomes", body)[0] == 200


def lengthen(project: Project, count: int) -> None:
    """Append events of other views and models, until the ledger has `count` events. The cluster must be down."""
    ledger = project.ledger()
    more = count - ledger.head()
    events = itertools.islice(history(views=("clicks", "orders"), model="fraud"), max(0, more))
    load_events(ledger, events, apart=dt.timedelta(seconds=20), indexed=True)
    ledger.close()


def seconds(project: Project, command: tuple[str, ...]) -> float | None:
    """Return the time of a command in seconds, or None if it failed."""
    if command[0] == "cluster.up":
        command = (*command, *(f"cluster.ports.{name}={port}" for name, port in project.ports.items()))
    started = time.perf_counter()
    done = project.run_python("-m", *command)
    took = time.perf_counter() - started
    if done.returncode:
        print(f"{command[0]} failed: {done.stderr[-500:]}", flush=True)
        return None
    return took


class Times:
    """Times of commands in both projects."""

    def __init__(self, projects: dict[int, Project]) -> None:
        self._projects = projects
        self._took: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._turn = 0

    def take(self, name: str, command: tuple[str, ...], *, counts: bool) -> None:
        """Run a command in both projects, one after the other. The order changes with every call."""
        self._turn += 1
        for count in sorted(self._projects, reverse=bool(self._turn % 2)):
            took = seconds(self._projects[count], command)
            if counts and took is not None:
                self._took[name, count].append(took)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Print and yield the medians."""
        for name in dict.fromkeys(name for name, _ in self._took):
            times = [self._took[name, count] for count in (SMALL, LARGE)]
            if not all(times):
                print(
                    f"command {name:16} has no figure, because it failed in each turn of a project",
                    flush=True,
                )
                continue
            small, large = map(statistics.median, times)
            print(f"command {name:16} {small:7.2f} {large:7.2f} s, ratio {large / small:5.2f}", flush=True)
            for count, value in ((SMALL, small), (LARGE, large)):
                yield {
                    "system": "falaj",
                    "case": f"{count} events",
                    "metric": f"command_{name}",
                    "value": value,
                    "unit": "s",
                }


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """Measure and print the figures, and yield them."""
    with contextlib.ExitStack() as ended:
        projects: dict[int, Project] = {}
        for count in (SMALL, LARGE):
            projects[count] = project = new_project(folder / str(count))
            ended.callback(project.run_python, "-m", "cluster.down")
            prepare(project)
            project.run_python("-m", "cluster.down", check=True)
            lengthen(project, count)
        times = Times(projects)
        for turn in range(START_TURNS + 1):
            if turn:
                times.take("cluster.down", ("cluster.down",), counts=turn > 1)
            times.take("cluster.up", ("cluster.up",), counts=turn > 0)
        for turn in range(TURNS + 1):
            for name, command in COMMANDS.items():
                times.take(name, command, counts=turn > 0)
        yield from times.rows()
