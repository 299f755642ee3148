"""Tests of the same commands under `ray job submit --working-dir .`, from a user's folder outside the checkout."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from datetime import timedelta

from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, Sensitivity

from arithmetic import doubled

person = Entity("person", join_keys=["person_id"])
income = FeatureView(
    "submitted_income",
    entities=[person],
    ttl=timedelta(days=365),
    source=FileSource("income.parquet", event_timestamp="event_timestamp"),
    schema=[Field(name, "float64", sensitivity=Sensitivity.PUBLIC) for name in ("amount", "doubled")],
    transform=doubled,
    owner="risk",
    purposes=["testing"],
)
submitted = FeatureService("submitted", views=[income])
"""
PEOPLE = 400
ARITHMETIC = """
import pyarrow as pa
import pyarrow.compute as pc


def doubled(batch: pa.Table) -> pa.Table:
    return batch.append_column("doubled", pc.multiply(batch["amount"], 2.0))
"""


def people_and_income() -> tuple[pa.Table, pa.Table]:
    """Return people with a label, and the income of each."""
    when = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    income = pa.table(
        {
            "person_id": pa.array(range(PEOPLE), pa.int64()),
            "event_timestamp": pa.array([when] * PEOPLE, pa.timestamp("us", tz="UTC")),
            "amount": pa.array([float(number) for number in range(PEOPLE)]),
        }
    )
    label = pa.array([number // 40 % 2 for number in range(PEOPLE)], pa.int64())
    return income.drop_columns("amount").append_column("y", label), income


@pytest.fixture(scope="module")
def workspace(falaj_cluster: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with its own definitions.

    Its data is in the project, because relative paths start there.
    """
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "submitted.py").write_text(DEFINITIONS)
    (folder / "arithmetic.py").write_text(ARITHMETIC)
    people, income = people_and_income()
    pq.write_table(income, falaj_cluster.root / "income.parquet")
    pq.write_table(people, falaj_cluster.root / "people.parquet")
    return folder


def submit(
    project: Project, folder: Path, name: str, *command: str, role: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command under `ray job submit` from a shell in `folder`. With a role, submit through the edge."""
    ray, options, env = str(Path(sys.executable).parent / "ray"), ["--working-dir", "."], project.env
    if role is not None:
        options += ["--verify", str(project.storage_root / "tls" / "ca.pem")]
        header = {"Authorization": f"Bearer {project.token(role)}"}
        env = env | {
            "RAY_API_SERVER_ADDRESS": f"{project.edge_url}/ray",
            "RAY_JOB_HEADERS": json.dumps(header),
        }
    return subprocess.run(
        [ray, "job", "submit", "--submission-id", name, *options, "--", "python", "-m", *command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def job_details(project: Project, name: str) -> dict[str, Any]:
    """Return what Ray's dashboard shows of a job."""
    token = Path(project.record.token_path).read_text().strip()
    request = urllib.request.Request(
        f"{project.record.dashboard_url}/api/jobs/{name}", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        details: dict[str, Any] = json.load(response)
    return details


def test_a_users_own_definitions_run_as_ray_jobs(falaj_cluster: Project, workspace: Path) -> None:
    """The user's modules can be imported in the driver and in Ray's workers.

    State is written to the recorded project.
    """
    definitions = "definitions=submitted"
    applied = submit(falaj_cluster, workspace, "apply", "feature_jobs.apply", definitions)
    assert applied.returncode == 0, applied.stdout + applied.stderr
    arguments = (definitions, "view=submitted_income", "num_buckets=2")
    ingested = submit(falaj_cluster, workspace, "ingest", "feature_jobs.ingest", *arguments)
    assert ingested.returncode == 0, ingested.stdout + ingested.stderr
    assert f"{PEOPLE} rows in = {PEOPLE} stored + 0 quarantined" in ingested.stdout
    parts = sorted((falaj_cluster.storage_root / "features" / "submitted_income").rglob("*.parquet"))
    rows = pa.concat_tables([pq.ParquetFile(part).read(["amount", "doubled"]) for part in parts]).to_pylist()
    assert sorted((row["amount"], row["doubled"]) for row in rows) == [
        (float(n), 2.0 * n) for n in range(PEOPLE)
    ]
    assert sorted(path.name for path in workspace.iterdir() if path.name != "__pycache__") == [
        "arithmetic.py",
        "submitted.py",
    ]
    details = job_details(falaj_cluster, "ingest")
    assert details["status"] == "SUCCEEDED"
    assert details["driver_exit_code"] == 0
    assert "feature_jobs.ingest" in details["entrypoint"]
    # The dashboard shows a job's runtime environment in plain text.
    assert Path(falaj_cluster.record.token_path).read_text().strip() not in json.dumps(details)


def test_the_job_and_the_shell_see_the_same_platform(falaj_cluster: Project, workspace: Path) -> None:
    """A batch that a Ray job has ingested is not ingested again from a shell in the user's folder."""
    arguments = ("definitions=submitted", "view=submitted_income")
    falaj_cluster.run("feature_jobs.apply", "definitions=submitted", cwd=workspace, check=True)
    result = falaj_cluster.run("feature_jobs.ingest", *arguments, cwd=workspace, check=True)
    assert "ingested already" in result.stdout


def test_the_stages_from_training_set_to_deployment_run_as_ray_jobs(
    falaj_cluster: Project, workspace: Path
) -> None:
    """Each stage runs as a Ray job with the same command line as in a shell. The dashboard shows each job."""
    data = ("name=submitted", "training_set=submitted.parquet")
    stages = {
        "training_set": (
            "feature_jobs",
            "definitions=submitted",
            "service=submitted",
            "entities=people.parquet",
        ),
        "materialize": ("feature_jobs", "definitions=submitted", "view=submitted_income"),
        "train": ("jobs", *data, "model=lightgbm", "label=y"),
        "evaluate": ("jobs", *data, "version=1"),
        "deploy": ("serve_apps", data[0], "version=1"),
        "rollout": ("serve_apps", data[0], "action=show"),
    }
    outputs = {"training_set": ("output=submitted.parquet",)}
    for name, (package, *arguments) in stages.items():
        done = submit(falaj_cluster, workspace, name, f"{package}.{name}", *arguments, *outputs.get(name, ()))
        assert done.returncode == 0, done.stdout + done.stderr
        assert job_details(falaj_cluster, name)["driver_exit_code"] == 0


def test_a_refusal_is_1_for_the_submitter_and_2_for_the_driver(
    falaj_cluster: Project, workspace: Path
) -> None:
    """A refusal gives exit code 1 for the submitter and 2 for the driver.

    Ray's client has only the exit codes 0 and 1. This job is submitted through the edge.
    """
    command = ("feature_jobs.apply", "definitions=nowhere")
    result = submit(falaj_cluster, workspace, "refused", *command, role="admin")
    assert result.returncode == 1
    assert "refused: " in result.stdout
    assert "nowhere" in result.stdout
    details = job_details(falaj_cluster, "refused")
    assert details["status"] == "FAILED"
    assert details["driver_exit_code"] == 2


def test_through_the_edge_nobody_submits_who_may_not_manage_the_cluster(
    falaj_cluster: Project, workspace: Path
) -> None:
    """The edge rejects jobs from roles that may not manage the cluster.

    A job has all rights of the cluster's user.
    """
    result = submit(falaj_cluster, workspace, "forbidden", "cluster.status", role="ml_engineer")
    assert result.returncode == 1
    assert "Your role may not manage cluster" in result.stdout + result.stderr
