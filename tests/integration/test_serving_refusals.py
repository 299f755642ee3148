"""Commands with wrong input, in a shell and as a Ray job: exit code 2 and one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import pytest

from tests.integration.conftest import refusal
from tests.projects.loan import Shop

if TYPE_CHECKING:
    from tests.integration.conftest import Project


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("feature_jobs.ingest", ("definitions=loans", "view=incme"), "Did you mean 'income'"),
        (
            "feature_jobs.ingest",
            ("definitions=loans", "view=income", "source.path=none.parquet"),
            "none.parquet",
        ),
        ("feature_jobs.ingest", ("definitions=loans", "view=income", "source.path=loans.py"), "loans.py"),
        (
            "feature_jobs.ingest",
            ("definitions=loans", "view=income", "source.path=customers.parquet"),
            "amount",
        ),
        ("feature_jobs.apply", ("definitions=nothing",), "nothing"),
        (
            "feature_jobs.training_set",
            ("service=crdit", "entities=customers.parquet", "output=x.parquet"),
            "credit",
        ),
        (
            "feature_jobs.training_set",
            ("service=credit", "entities=none.parquet", "output=x.parquet"),
            "none.parquet",
        ),
        (
            "jobs.train",
            ("name=loan", "training_set=loans.parquet", "label=nothing", "split.column=null"),
            "nothing",
        ),
        ("jobs.evaluate", ("name=lone", "training_set=loans.parquet"), "Did you mean 'loan'"),
        ("serve_apps.deploy", ("name=loan", "version=99"), "no version 99"),
        ("serve_apps.rollout", ("action=promote", "name=loan"), "No rollout"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    shop: Shop, module: str, arguments: tuple[str, ...], said: str
) -> None:
    """Exit code 2, what, which, what to do."""
    assert said in refusal(shop.project.run(module, *arguments))


def test_a_job_runs_under_ray_job_submit(shop: Shop) -> None:
    """The same line; a refusal's exit code is in the job's details."""
    done = submit(shop.project, "feature_jobs.apply", "definitions=loans")
    refused = submit(shop.project, "feature_jobs.ingest", "definitions=loans", "view=incme")
    assert (done["status"], done["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert (refused["status"], refused["driver_exit_code"]) == ("FAILED", 2)


def submit(project: Project, module: str, *arguments: str) -> dict[str, Any]:
    submission = f"test-{module}-{time.time_ns()}"
    command = ["job", "submit", "--submission-id", submission, "--working-dir", ".", "--"]
    project.run_python("-m", "ray.scripts.scripts", *command, "python", "-m", module, *arguments)
    request = Request(f"{project.record.dashboard_url}/api/jobs/{submission}")
    request.add_header("Authorization", f"Bearer {Path(project.record.token_path).read_text()}")
    with urlopen(request, timeout=10) as response:
        details: dict[str, Any] = json.load(response)
    return details
