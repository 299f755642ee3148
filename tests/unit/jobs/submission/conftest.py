"""A job service without Ray: a real ledger, real tokens and policies, and jobs that a test starts and ends."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from cluster.host.submission import SubmissionConfig
from cluster.ledger import Ledger
from cluster.ledger.events import JobFinished, JobRefused, JobStarted
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord
from cluster.settings import IssuerConfig
from cluster.storage import Layout
from jobs.submission.http import JobApi
from jobs.submission.metrics import JobMetrics
from jobs.submission.operations import JobOperations
from jobs.submission.overrides import JobRules
from jobs.submission.paths import PathRules
from jobs.submission.recorded_jobs import Job
from jobs.submission.runner import JobRunner

APPLY = {"module": "feature_jobs.apply", "overrides": ["plan=true"]}


@dataclass
class StartedJobs:
    """A double of Ray's job API. A test ends the jobs."""

    over: dict[str, bool] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def submit(self, job: Job) -> None:
        self.started.append(job.id)
        self.over[job.id] = False

    def is_over(self, job: str) -> bool | None:
        return self.over.get(job)

    def stop(self, job: str) -> None:
        self.stopped.append(job)
        self.over[job] = True


class Service:
    """The service of one project, and a client of it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        self.places = Layout(str(root / ".falaj"))
        Path(self.places.keys).mkdir(parents=True)
        ensure_issuer(self.places)
        self.url = f"sqlite:///{root}/ledger.db"
        self.ledger = Ledger(self.url)
        self.jobs = StartedJobs()
        self.settings = SubmissionConfig(**settings)
        self.now = dt.datetime.now(dt.UTC)
        self.restart()

    def restart(self) -> None:
        """Start the service anew, as after `kill -9`: it knows only what the ledger has."""
        intents = Path(self.places.keys) / "job_intents"
        self.runner = JobRunner(
            self.ledger,
            self.jobs,
            intents=intents,
            max_running=self.settings.max_running,
            clock=lambda: self.now,
        )
        roots = (str(self.root / ".falaj"),)
        self.operations = JobOperations(
            ledger=self.ledger,
            runner=self.runner,
            trust=Trust.of(IssuerConfig(), self.places),
            policy=Policy.load(),
            environment="production",
            region="local",
            decisions=DecisionRecorder(self.ledger.append),
            rules=JobRules(
                settings=self.settings,
                paths=PathRules(
                    project=str(self.root), roots=roots, allowed=tuple(self.settings.allowed_paths)
                ),
            ),
            intents=intents,
            issues_intents=True,
        )
        api = JobApi(self.operations, record(self.root), JobMetrics(CollectorRegistry()))
        self.client = TestClient(api.app())

    def token(self, role: Role = Role.data_engineer, *, subject: str = "alice", **claims: Any) -> str:
        return mint_token(self.places, subject=subject, role=role, **{"purpose": "credit", **claims})

    def call(
        self,
        method: str,
        path: str = "/v1/jobs",
        body: Any = None,
        *,
        role: Role = Role.data_engineer,
        subject: str = "alice",
        token: str | None = None,
    ) -> tuple[int, Any]:
        """Send a request, and return status and JSON."""
        headers = {"Authorization": f"Bearer {token or self.token(role, subject=subject)}"}
        answer = self.client.request(method, path, json=body, headers=headers)
        return answer.status_code, answer.json()

    def submit(self, body: Any = None, **who: Any) -> str:
        """Submit a job that is accepted, and return its id."""
        status, content = self.call("POST", body=APPLY if body is None else body, **who)
        assert status == 202, content
        return str(content["id"])

    def refusals(self) -> list[dict[str, Any]]:
        """Return the events of forbidden requests."""
        return [dict(entry.payload) for entry in self.ledger.entries(JobRefused)]

    def start(self, job: str) -> None:
        """Record a start, as the job's process does."""
        self.ledger.append_once(JobStarted(job=job), actor="t", job=job)

    def finish(self, job: str, *, state: str = "done", exit_code: int = 0) -> None:
        """Record an end, as the job's process does."""
        event = JobFinished(job=job, state=state, exit_code=exit_code)
        self.ledger.append_once(event, actor="t", job=job)
        self.jobs.over[job] = True

    def check(self) -> None:
        """Check every job now."""
        for job in self.runner.unfinished():
            self.runner.watch(job)
        assert self.runner.check_once()


def record(root: Path) -> ClusterRecord:
    """Return the record of a cluster whose logs are in `root/ray`."""
    texts = dict.fromkeys(
        ("ray_address", "dashboard_url", "edge_url", "metrics_url", "ray_metrics_url", "serve_http_url"), ""
    )
    return ClusterRecord(
        cluster_id="c",
        project_root=str(root),
        storage_root=str(root / ".falaj"),
        token_path="",
        temp_dir=str(root / "ray"),
        key_socket="",
        tls=False,
        ports={},
        pids={},
        started_at="",
        **texts,
    )


@pytest.fixture
def new_service(tmp_path: Path) -> Callable[..., Service]:
    """Return a function that starts a service with these settings."""
    return lambda **settings: Service(tmp_path / "project", **settings)


@pytest.fixture
def service(new_service: Callable[..., Service]) -> Service:
    """Return a service with default settings."""
    return new_service()
