"""Tests of submitted jobs: who may do what, client keys, limits, and a service that is killed at any moment."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import socket
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.host.http_socket import listening
from cluster.ledger.events import (
    AccessDecided,
    JobFinished,
    JobStopped,
    JobSubmitted,
    StrangersRefused,
)
from cluster.security.tokens.intent import IntentVerifier, mint_intent
from cluster.security.tokens.issuer import TOKEN_TTL_S
from cluster.security.tokens.principal import Principal, TokenVerifier
from cluster.security.tokens.roles import Role
from cluster.settings import PlatformConfig
from jobs.principal_tokens import access_token
from jobs.submission import recorded_jobs
from jobs.submission.http import MAX_BODY_BYTES
from jobs.submission.run_job import callers_intent, command_line
from tests.unit.jobs.submission.conftest import APPLY, record

if TYPE_CHECKING:
    from tests.unit.jobs.submission.conftest import Service

MODULE = "feature_jobs.apply"
SUBMITTERS = {Role.data_engineer, Role.data_scientist, Role.ml_engineer, Role.approver, Role.admin}


@pytest.mark.parametrize("role", list(Role))
def test_each_role_submits_or_is_denied_with_an_event(service: Service, role: Role) -> None:
    """The roles in `SUBMITTERS` submit jobs. All others get 403. Each answer has its event."""
    status, content = service.call("POST", body=APPLY, role=role)
    jobs = [entry.payload for entry in service.ledger.entries(JobSubmitted)]
    denied = [
        entry.payload for entry in service.ledger.entries(AccessDecided) if not entry.payload["allowed"]
    ]
    if role in SUBMITTERS:
        assert (status, content["status"], len(denied)) == (202, "pending", 0)
        assert [(job["job"], job["principal"]["role"]) for job in jobs] == [(content["id"], role.value)]
        service.check()
        assert service.jobs.started == [content["id"]]
    else:
        assert (status, jobs) == (403, [])
        assert [(event["action"], event["role"]) for event in denied] == [("submit_jobs", role.value)]


def test_only_submitter_and_admin_read_the_log_or_stop(service: Service) -> None:
    """Others get 403, and an event each. An auditor sees the job, but not its log."""
    job = service.submit(role=Role.data_engineer, subject="alice")
    expected = {
        ("alice", Role.data_engineer): (200, 200, 202),
        ("bob", Role.data_engineer): (403, 403, 403),
        ("alice", Role.service): (403, 403, 403),
        ("eve", Role.auditor): (200, 403, 403),
        ("root", Role.admin): (200, 200, 202),
    }
    for (subject, role), statuses in expected.items():
        headers = {"Authorization": f"Bearer {service.token(role, subject=subject)}"}
        log = service.client.get(f"/v1/jobs/{job}/logs?follow=false", headers=headers).status_code
        shown = service.call("GET", f"/v1/jobs/{job}", role=role, subject=subject)[0]
        stopped = service.call("DELETE", f"/v1/jobs/{job}", role=role, subject=subject)[0]
        assert (shown, log, stopped) == statuses, (subject, role)
    stops = [entry.payload["subject"] for entry in service.ledger.entries(JobStopped)]
    assert stops == ["alice"]


def test_list_has_own_jobs_and_all_for_admin_and_auditor(service: Service) -> None:
    """The newest job is the first."""
    first, second = service.submit(subject="alice"), service.submit(subject="bob")
    ids = {
        (subject, role): [job["id"] for job in service.call("GET", role=role, subject=subject)[1]["jobs"]]
        for subject, role in (("alice", Role.data_engineer), ("x", Role.admin), ("y", Role.auditor))
    }
    assert list(ids.values()) == [[first], [second, first], [second, first]]
    assert service.call("GET", role=Role.service)[0] == 403
    assert service.call("GET", "/v1/jobs?limit=1", role=Role.admin)[1]["jobs"][0]["id"] == second


def test_invalid_tokens_get_401_and_other_tenants_403(service: Service) -> None:
    """An intent is no access token."""
    assert service.client.get("/v1/jobs").status_code == 401
    assert service.call("GET", token="none")[0] == 401
    found = recorded_jobs.find(service.ledger, service.submit())
    assert found is not None
    with callers_intent(PlatformConfig(), record(service.root), found) as variables:
        intent = Path(next(iter(variables.values()))).read_text()
    assert service.call("GET", token=intent)[0] == 401
    other = service.token(Role.admin, tenant="other")
    assert [service.call(method, body=APPLY, token=other)[0] for method in ("GET", "POST")] == [403, 403]
    service.operations.decisions.flush()
    assert sum(entry.payload["count"] for entry in service.ledger.entries(StrangersRefused)) == 3


def test_same_key_gives_the_same_job(service: Service) -> None:
    """Other content is refused with 409. The same key of another caller is another job."""
    body = {**APPLY, "key": "night 7"}
    job = service.submit(body)
    assert service.call("POST", body=body) == (200, {"id": job, "status": "pending"})
    for other in ({"overrides": []}, {"module": "feature_jobs.materialize", "overrides": ["view=income"]}):
        assert service.call("POST", body={**body, **other})[0] == 409
    assert service.call("POST", body=body, role=Role.ml_engineer)[0] == 409
    assert service.submit(body, subject="bob") != job
    service.restart()
    assert service.call("POST", body=body)[1]["id"] == job
    assert len(list(service.ledger.entries(JobSubmitted))) == 2


@pytest.mark.parametrize(
    "body",
    [
        *(
            [],
            "x",
            None,
            {},
            {"module": 1},
            {"module": ""},
            {**APPLY, "code": "x"},
            {**APPLY, "working_dir": "."},
        ),
        *({**APPLY, "overrides": "a=1"}, {**APPLY, "overrides": [1]}, {**APPLY, "key": ""}),
        *({**APPLY, "key": "a\nb"}, {**APPLY, "key": "x" * 201}, {**APPLY, "intent": "x"}),
        {**APPLY, "overrides": ["plan=true"] * 101},
        {**APPLY, "overrides": [f"definitions={'x' * 3000}"]},
    ],
)
def test_wrong_bodies_are_refused(service: Service, body: Any) -> None:
    """A body without the right form gets 400 with one line."""
    status, content = service.call("POST", body=body)
    assert (status, set(content)) == (400, {"error", "code"})


def test_huge_compressed_and_broken_bodies_are_refused(service: Service) -> None:
    """A body has at most 64 KiB. Deeply nested JSON is no error of the service."""
    headers = {"Authorization": f"Bearer {service.token()}"}
    for content, more, status in (
        (b" " * (MAX_BODY_BYTES + 1), {}, 413),
        (b"{}", {"content-encoding": "gzip"}, 415),
        (b"[" * 60_000, {}, 400),
        (b"\xff", {}, 400),
        (b"", {}, 400),
    ):
        answer = service.client.post("/v1/jobs", content=content, headers={**headers, **more})
        assert (answer.status_code, answer.json()["code"]) == (status, status)
    assert service.client.put("/v1/jobs", headers=headers).json()["code"] == 405
    assert service.client.get("/v1/job", headers=headers).json()["code"] == 404
    assert service.call("GET", "/v1/jobs?limit=-1")[0] == 400
    assert service.call("GET", "/v1/jobs/job-none")[0] == 404


def test_caller_has_few_unfinished_jobs(new_service: Callable[..., Service]) -> None:
    """One caller's limit does not stop another; a limit for all callers does. A finished job makes room."""
    service = new_service(max_per_caller=2, max_unfinished=3)
    jobs = [service.submit(), service.submit()]
    status, content = service.call("POST", body=APPLY)
    assert (status, "2 unfinished" in content["error"]) == (429, True)
    service.submit(subject="bob")
    assert service.call("POST", body=APPLY, subject="carol")[0] == 429
    service.check()
    service.finish(jobs[0])
    service.check()
    service.submit()


def test_few_jobs_run_at_the_same_time(new_service: Callable[..., Service]) -> None:
    """The others wait, and start in their order."""
    service = new_service(max_running=2)
    jobs = [service.submit() for _ in range(4)]
    service.check()
    assert service.jobs.started == jobs[:2]
    service.start(jobs[0])
    service.finish(jobs[0])
    service.check()
    service.check()
    assert service.jobs.started == jobs[:3]


def test_with_an_oidc_issuer_the_caller_sends_the_intent(service: Service) -> None:
    """It must be of the caller and for the module. The ledger never has it, and its file is removed after the job."""
    service.operations.issues_intents = False
    principal = TokenVerifier.of(service.places).verify(service.token())
    intents = {
        "mine": mint_intent(service.places, principal, entrypoint=MODULE),
        "of another module": mint_intent(service.places, principal, entrypoint="feature_jobs.ingest"),
        "of an admin": mint_intent(
            service.places, dataclasses.replace(principal, role=Role.admin), entrypoint=MODULE
        ),
    }
    statuses = {
        name: service.call("POST", body={**APPLY, "intent": intent})[0] for name, intent in intents.items()
    }
    assert statuses == {"mine": 202, "of another module": 401, "of an admin": 401}
    assert service.call("POST", body=APPLY)[0] == 400
    assert service.call("POST", body={"module": "jobs.pipeline"})[0] == 400
    [job] = service.runner.unfinished()
    file = Path(service.places.keys) / "job_intents" / f"{job.id}.jwt"
    assert (file.read_text(), file.stat().st_mode & 0o777) == (intents["mine"], 0o600)
    assert intents["mine"] not in "".join(str(entry.payload) for entry in service.ledger.entries())
    service.check()
    service.start(job.id)
    service.finish(job.id)
    service.check()
    assert not file.exists()


def test_service_killed_between_event_and_start_starts_the_job_once(service: Service) -> None:
    """What the ledger has is done by the next service, and not twice."""
    job = service.submit()
    service.restart()
    service.check()
    service.restart()
    service.check()
    assert service.jobs.started == [job]
    service.start(job)
    service.finish(job)
    service.restart()
    assert (service.runner.unfinished(), service.jobs.started) == ([], [job])
    assert service.call("GET", f"/v1/jobs/{job}")[1]["status"] == "done"


def test_job_whose_process_was_killed_is_lost_and_not_repeated(service: Service) -> None:
    """A job that ended before its start is named, too. Neither is started again."""
    lost, unborn = service.submit(), service.submit()
    service.check()
    service.start(lost)
    service.jobs.over.update({lost: True, unborn: True})
    service.check()
    states = {job: service.call("GET", f"/v1/jobs/{job}")[1]["status"] for job in (lost, unborn)}
    assert states == {lost: "lost", unborn: "not started"}
    assert service.jobs.started == [lost, unborn]


def test_stop_works_at_every_moment(service: Service) -> None:
    """Before the start, while the job runs, after `kill -9` of the service, and after the end."""
    waiting, running, killed = service.submit(), service.submit(), service.submit()
    assert service.call("DELETE", f"/v1/jobs/{waiting}")[1]["status"] == "stopping"
    service.check()
    assert service.jobs.started == [running, killed]
    for job in (running, killed):
        service.start(job)
    service.call("DELETE", f"/v1/jobs/{running}")
    service.call("DELETE", f"/v1/jobs/{killed}")
    service.restart()
    service.check()
    service.check()
    assert sorted(service.jobs.stopped) == sorted([running, killed])
    for job in (waiting, running, killed):
        assert service.call("GET", f"/v1/jobs/{job}")[1]["status"] == "stopped"
        assert service.call("DELETE", f"/v1/jobs/{job}") == (200, {"id": job, "status": "stopped"})
    finished = [entry.payload["job"] for entry in service.ledger.entries(JobFinished)]
    assert len(finished) == len(set(finished)) == 3


def test_job_that_waited_too_long_is_not_started(service: Service) -> None:
    """The rights of its caller may have ended since."""
    job = service.submit()
    service.now += dt.timedelta(hours=2)
    service.check()
    assert service.jobs.started == []
    assert service.call("GET", f"/v1/jobs/{job}")[1]["status"] == "not started"


def test_job_acts_with_the_callers_rights_and_no_more(service: Service) -> None:
    """Subject, role, purpose, tenant and models are the token's. The intent is for the module only."""
    token = service.token(Role.ml_engineer, subject="mia", purpose="fraud", scope="model:a model:b")
    job = recorded_jobs.find(service.ledger, service.call("POST", body=APPLY, token=token)[1]["id"])
    assert job is not None
    with callers_intent(PlatformConfig(), record(service.root), job) as variables:
        path = Path(next(iter(variables.values())))
        intent = IntentVerifier.of(service.places).verify(path.read_text(), entrypoint=MODULE)
        assert path.stat().st_mode & 0o777 == 0o600
        assert intent.principal.expires_at - time.time() <= TOKEN_TTL_S
    assert not path.exists()
    mine = TokenVerifier.of(service.places).verify(token)
    assert rights(intent.principal) == rights(mine)
    again = TokenVerifier.of(service.places).verify(access_token(service.places, job.principal))
    assert rights(again) == rights(mine)


def rights(principal: Principal) -> tuple[object, ...]:
    """Return all that policies look at, but the entry point."""
    return (principal.subject, principal.role, principal.purpose, principal.tenant, principal.models)


def test_command_line_has_the_overrides_as_they_are(
    new_service: Callable[..., Service], tmp_path: Path
) -> None:
    """The installation's folder of configurations comes with them."""
    service = new_service(config_dir=str(tmp_path))
    overrides = ["plan=true", "definitions=feature_jobs.census"]
    job = recorded_jobs.find(service.ledger, service.submit({**APPLY, "overrides": overrides}))
    assert job is not None
    assert command_line(job)[1:] == ["-m", MODULE, "--config-dir", str(tmp_path), *overrides]


def test_socket_is_private(service: Service, tmp_path: Path) -> None:
    """Only the owner may connect. A socket file of a killed service does not stop the next one."""
    path = Path(f"/tmp/falaj-jobs-{os.getpid()}.sock")
    path.touch()
    with listening(service.client.app, path):  # type: ignore[arg-type]
        assert path.stat().st_mode & 0o777 == 0o600
        connection = HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/v1/jobs")
        assert connection.getresponse().status == 401
        connection.close()
    assert not path.exists()
