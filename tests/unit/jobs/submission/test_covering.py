"""Tests that a token reads and stops only jobs whose rights it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.ledger.events import AccessDecided
from cluster.security.tokens.roles import Role
from tests.unit.jobs.submission.conftest import APPLY

if TYPE_CHECKING:
    from tests.unit.jobs.submission.conftest import Service

WIDE = {"role": Role.ml_engineer, "purpose": "fraud", "scope": "model:a model:b"}
MORE = [
    WIDE,
    WIDE | {"scope": ""},
    WIDE | {"scope": "model:a model:b model:c"},
]
LESS = [
    WIDE | {"scope": "model:a"},
    WIDE | {"scope": "model:c"},
    WIDE | {"purpose": "testing"},
    WIDE | {"purpose": ""},
    WIDE | {"role": Role.data_engineer},
    WIDE | {"role": Role.approver, "scope": ""},
]


def statuses(service: Service, job: str, token: str) -> list[int]:
    """Return the status of each request about a job, and 1 or 0 for whether the list of jobs has it."""
    headers = {"Authorization": f"Bearer {token}"}
    log = service.client.get(f"/v1/jobs/{job}/logs?follow=false", headers=headers).status_code
    listed = [each["id"] for each in service.call("GET", token=token)[1]["jobs"]]
    shown, stopped = (service.call(method, f"/v1/jobs/{job}", token=token)[0] for method in ("GET", "DELETE"))
    return [shown, log, stopped, listed.count(job)]


@pytest.mark.parametrize("claims", LESS)
def test_token_with_fewer_rights_cannot_use_a_job(service: Service, claims: dict[str, object]) -> None:
    """The job of the same subject has another role or purpose, or more models. Each denial is an event that names the
    policy, and the answer says what to do."""
    job = service.submit(token=service.token(**WIDE))
    token = service.token(**claims)  # type: ignore[arg-type]
    assert statuses(service, job, token) == [403, 403, 403, 0]
    denied = [e.payload for e in service.ledger.entries(AccessDecided) if not e.payload["allowed"]]
    assert [event["policies"] for event in denied] == [["job-with-more-rights"]] * len(denied)
    assert "role and purpose" in service.call("GET", f"/v1/jobs/{job}", token=token)[1]["error"]


@pytest.mark.parametrize("claims", MORE)
def test_token_with_the_rights_of_a_job_uses_it(service: Service, claims: dict[str, object]) -> None:
    """It has the same rights, or the right to more models."""
    job = service.submit(token=service.token(**WIDE))
    assert statuses(service, job, service.token(**claims)) == [200, 200, 202, 1]  # type: ignore[arg-type]


def test_job_without_a_purpose_needs_none(service: Service) -> None:
    """It has no right that needs a purpose. Only a token without a scope covers a job without one."""
    job = service.submit(token=service.token(purpose=""))
    assert statuses(service, job, service.token(purpose="fraud")) == [200, 200, 202, 1]
    assert statuses(service, job, service.token(scope="model:a"))[0] == 403


def test_admin_uses_every_job_and_an_auditor_sees_it(service: Service) -> None:
    """Also with the subject of the submitter and another purpose."""
    job = service.submit(token=service.token(**WIDE))
    assert statuses(service, job, service.token(Role.auditor)) == [200, 403, 403, 1]
    assert statuses(service, job, service.token(Role.admin)) == [200, 200, 202, 1]


def test_list_reads_past_jobs_that_a_token_may_not_see(service: Service) -> None:
    """The number of listed jobs is that of the jobs that the token may see."""
    seen = service.submit(APPLY)
    service.submit(token=service.token(purpose="fraud"))
    listed = service.call("GET", "/v1/jobs?limit=1")[1]["jobs"]
    assert [job["id"] for job in listed] == [seen]
