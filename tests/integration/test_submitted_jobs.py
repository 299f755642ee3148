"""Submitted jobs on a cluster: through the edge, as Ray jobs, with the caller's rights, also after `kill -9`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.ledger.events import AccessDecided, JobFinished, JobRefused, JobStarted, JobSubmitted
from cluster.node.parts import Part, find_parts
from cluster.security.tokens.intent import write_intent
from cluster.security.tokens.roles import Role
from jobs.ray_jobs import RayJobs
from tests.integration.client import Client
from tests.integration.conftest import refusal
from tests.servers.polling import wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import Project

PLAN = {"module": "feature_jobs.apply", "overrides": ["plan=true"]}
APPLY = {"module": "feature_jobs.apply"}
SUBMITTERS = {Role.data_engineer, Role.data_scientist, Role.ml_engineer, Role.approver, Role.admin}
FORBIDDEN = [
    "identity.role=admin",
    "ledger.url=sqlite:///x",
    "+hydra.run.dir=/",
    "definitions=${oc.env:HOME}",
]


def test_job_runs_with_its_callers_rights(falaj_cluster: Project) -> None:
    """Through the edge, a data engineer's job plans definitions. A data scientist's job may not apply any."""
    caller = Caller(falaj_cluster)
    wait_until(lambda: caller.ask("GET")[0] == 200, seconds=60)
    allowed = caller.submit(PLAN, Role.data_engineer)
    denied = caller.submit(APPLY, Role.data_scientist)
    assert caller.result(allowed)["status"] == "done"
    assert RayJobs(falaj_cluster.record).status(allowed) is not None
    result = caller.result(denied)
    assert (result["status"], result["exit_code"]) == ("refused", 2)
    assert "apply definitions" in result["reason"]
    denials = [e.payload for e in falaj_cluster.ledger().entries(AccessDecided) if not e.payload["allowed"]]
    assert ("apply_definitions", "data_scientist", "feature_jobs.apply") in {
        (event["action"], event["role"], event["entrypoint"]) for event in denials
    }
    assert not list((falaj_cluster.storage_root / "keys" / "intents").glob("job-*"))


@pytest.mark.parametrize("role", [Role.service, Role.auditor])
def test_other_roles_and_forbidden_overrides_start_nothing(falaj_cluster: Project, role: Role) -> None:
    """Each answer has its event."""
    caller = Caller(falaj_cluster)
    before = len(list(falaj_cluster.ledger().entries(JobSubmitted)))
    assert caller.ask("POST", body=PLAN, role=role)[0] == 403
    for override in FORBIDDEN:
        body = {"module": "feature_jobs.apply", "overrides": [override]}
        assert caller.ask("POST", body=body, role=Role.data_engineer)[0] == 403, override
    refused = [entry.payload["rule"] for entry in falaj_cluster.ledger().entries(JobRefused)]
    assert refused[-4:] == ["reserved", "reserved", "syntax", "interpolation"]
    assert len(list(falaj_cluster.ledger().entries(JobSubmitted))) == before
    denied = [e.payload for e in falaj_cluster.ledger().entries(AccessDecided) if not e.payload["allowed"]]
    assert ("submit_jobs", role.value) in {(event["action"], event["role"]) for event in denied}


def test_killed_service_loses_no_job_and_doubles_none(falaj_cluster: Project) -> None:
    """The service is killed right after its answer. A job that is stopped at once does not run to its end."""
    caller = Caller(falaj_cluster)
    body = {**PLAN, "key": "once"}
    job = caller.submit(body, Role.data_engineer)
    os.kill(find_parts(falaj_cluster.record)[Part.jobs].pid, signal.SIGKILL)
    wait_until(lambda: caller.ask("GET")[0] == 200, seconds=60)
    assert caller.ask("POST", body=body)[1]["id"] == job
    stopped = caller.submit(APPLY, Role.data_engineer)
    assert caller.ask("DELETE", f"/v1/jobs/{stopped}")[0] == 202
    assert caller.result(job)["status"] == "done"
    assert caller.result(stopped)["status"] == "stopped"
    for kind in (JobStarted, JobFinished):
        of_job = [e for e in falaj_cluster.ledger().entries(kind) if e.payload["job"] == job]
        assert len(of_job) == 1


def test_client_follows_the_log_and_exits_like_the_job(falaj_cluster: Project, tmp_path: Path) -> None:
    """Its output is the job's log, and its exit code the job's. A forbidden job is refused in one line."""
    token = tmp_path / "token.jwt"
    write_intent(token, falaj_cluster.token("data_engineer"))
    options = ("--token-file", str(token))
    planned = falaj_cluster.run("jobs.submit", *options, "module=feature_jobs.apply", "plan=true", check=True)
    assert "3 to add" in planned.stdout
    assert "entrypoint" not in planned.stdout
    refused = falaj_cluster.run("jobs.submit", *options, "module=jobs.train", "name=m", "tier=smb_cpu")
    assert "tier" in refusal(refused)
    assert "jobs.sweep" in refusal(falaj_cluster.run("jobs.submit", *options, "-m", "module=jobs.train"))
    missing = falaj_cluster.run("jobs.submit", *options, "module=feature_jobs.materialize", "view=none")
    assert missing.returncode == 2
    assert "job-" in falaj_cluster.run("jobs.submit", *options, "--list", check=True).stdout


class Caller:
    """A client of `/v1/jobs` at the edge."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._client = Client(project)

    def ask(
        self, method: str, path: str = "/v1/jobs", body: Any = None, *, role: Role = Role.data_engineer
    ) -> tuple[int, dict[str, Any]]:
        """Send a request, and return status and JSON."""
        token = self._project.token(role.value, subject="caller")
        return self._client.call(path, body, token=token, method=method)

    def submit(self, body: Any, role: Role) -> str:
        """Submit a job that is accepted, and return its id."""
        status, content = self.ask("POST", body=body, role=role)
        assert status == 202, content
        return str(content["id"])

    def result(self, job: str) -> dict[str, Any]:
        """Wait until a job is over, and return it."""
        found: list[dict[str, Any]] = []

        def is_over() -> bool:
            found.append(self.ask("GET", f"/v1/jobs/{job}", role=Role.admin)[1])
            return "exit_code" in found[-1]

        wait_until(is_over, seconds=240)
        return found[-1]
