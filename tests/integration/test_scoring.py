"""Batch scoring on a real cluster: in Ray tasks, through the edge, and after `kill -9`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import polars as pl

from cluster.ledger.events import ModelMonitored, ScoringFinished, ScoringStarted
from cluster.security.tokens.roles import Role
from tests.integration.test_submitted_jobs import Caller
from tests.projects.loan import AS_OF, NUM_CUSTOMERS, Shop
from tests.servers.polling import wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import Project

LATEST = ("inputs_from=latest", f"as_of={AS_OF}")
MODEL = ("name=loan", "version=1", "input=customers.parquet")


def test_scores_in_tasks_equal_answers_of_the_edge(shop: Shop) -> None:
    """Rows are scored in Ray tasks, in several parts. The same customers get the same answers from a replica."""
    project = shop.project
    tasks = ("task_values=1", "part_rows=90", "output=scores")
    project.run("jobs.score", *MODEL, *LATEST, *tasks, check=True)
    scores = pl.read_parquet(project.root / "scores" / "part-*.parquet").sort("input_row")
    assert scores["customer_id"].to_list() == list(range(NUM_CUSTOMERS))
    for customer in (0, 1, 2, 57, 399):
        [answer] = shop.predict(customer)[1]["predictions"]
        row = scores.row(customer, named=True)
        assert {name: row[name] for name in answer} == answer


def test_a_killed_run_is_finished_by_the_same_command(loan_project: Project) -> None:
    """The command gets `kill -9` in the middle. Each row is then in the output exactly once."""
    arguments = (*MODEL, *LATEST, "task_values=1", "part_rows=4", "output=killed")
    folder = loan_project.root / "killed"
    command = subprocess.Popen(
        [sys.executable, "-m", "jobs.score", *arguments], cwd=loan_project.root, env=loan_project.env
    )
    wait_until(lambda: len(list(folder.glob("_parts/*.json"))) >= 3, "three parts", seconds=90)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    assert not (folder / "_manifest.json").exists()
    done = loan_project.run("jobs.score", *arguments, check=True).stdout
    assert "continuing: " in done
    scores = pl.read_parquet(folder / "part-*.parquet")
    assert sorted(scores["input_row"].to_list()) == list(range(NUM_CUSTOMERS))
    assert len(list(folder.glob("part-*"))) == NUM_CUSTOMERS // 4
    runs = [entry.payload["run"] for entry in loan_project.ledger().entries(ScoringStarted)]
    ended = [entry.payload["run"] for entry in loan_project.ledger().entries(ScoringFinished)]
    assert len(runs) == len(set(runs))
    assert sorted(runs) == sorted(ended)


def test_a_caller_scores_and_the_scores_are_monitored(loan_project: Project) -> None:
    """A data scientist submits the job at the edge. The scores are encrypted, and monitoring reads them."""
    caller = Caller(loan_project)
    wait_until(lambda: caller.ask("GET")[0] == 200, seconds=60)
    options = [*MODEL, *LATEST, "output=.falaj/jobs/scores"]
    job = caller.submit({"module": "jobs.score", "overrides": options}, Role.data_scientist)
    result = caller.result(job)
    assert result["status"] == "done", result
    loan_project.run(
        "jobs.monitor",
        "name=loan",
        "reference=loans.parquet",
        "label=repaid",
        "predictions=.falaj/jobs/scores",
        check=True,
    )
    [*_, event] = loan_project.ledger().entries(ModelMonitored)
    assert (event.payload["variant"], event.payload["version"]) == ("batch", 1)
    assert event.payload["periods"]["2024"]["rows"] == NUM_CUSTOMERS
