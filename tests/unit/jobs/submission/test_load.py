"""Tests that no caller can keep the service busy or break it with slow, deep or many submissions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from starlette.requests import ClientDisconnect

from jobs.submission import http
from jobs.submission.http import MAX_SUBMITTING, LogResponse
from jobs.submission.limits import MAX_NEW
from jobs.submission.overrides import MAX_ALL_CHARACTERS
from tests.unit.jobs.submission.conftest import APPLY

if TYPE_CHECKING:
    from tests.unit.jobs.submission.conftest import Service

INGEST = "feature_jobs.ingest"


@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, "{a:" * 400 + "1" + "}" * 400])
def test_deep_values_are_a_mistake(service: Service, value: str) -> None:
    """They exceed Python's recursion limit. The answer is 400 with one line, and counts as a refused request."""
    answers = [
        service.call("POST", body={"module": INGEST, "overrides": [f"view={value}"]}) for _ in range(2)
    ]
    assert [status for status, _ in answers] == [400, 400], answers
    assert service.operations._refused.total() == 2


def test_all_overrides_together_have_a_limit(service: Service) -> None:
    """Hydra parses 60,000 characters in ten seconds. The limit is checked before it parses anything."""
    long = "view=[" + ",".join("a" for _ in range(900)) + "]"
    overrides = [long] * (MAX_ALL_CHARACTERS // len(long) + 1)
    started = time.monotonic()
    status, content = service.call("POST", body={"module": INGEST, "overrides": overrides})
    assert (status, "characters together" in content["error"]) == (400, True), content
    assert time.monotonic() - started < 2


def test_slow_checks_delay_no_other_request(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a caller's submissions are checked, jobs are listed and stopped. A fifth submission of the caller gets 429,
    and another caller's is accepted afterwards."""
    checked, submit = threading.Event(), type(service.operations).submit

    def slow_submit(*arguments: Any) -> Any:
        checked.wait(30)
        return submit(*arguments)

    monkeypatch.setattr(type(service.operations), "submit", slow_submit)
    answers: list[int] = []
    with service.client:  # one event loop for all requests, as in the service
        threads = [
            threading.Thread(target=lambda: answers.append(service.call("POST", body=APPLY)[0]))
            for _ in range(MAX_SUBMITTING + 1)
        ]
        for thread in threads:
            thread.start()
        while not answers:
            time.sleep(0.01)
        assert answers == [429]
        assert service.call("GET")[0] == 200
        assert service.call("DELETE", "/v1/jobs/job-1")[0] == 404
        checked.set()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [202] * MAX_SUBMITTING + [429]
        assert service.call("POST", body=APPLY, subject="bob")[0] == 202


def test_log_counts_from_its_request_on(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for logs that wait for their check count, so with a limit of two the third gets 429. Afterwards none
    counts."""
    monkeypatch.setattr(http, "MAX_FOLLOWERS", 2)
    service.restart()
    job, checked, find = service.submit(), threading.Event(), type(service.operations).job

    def slow_find(*arguments: Any, **options: Any) -> Any:
        checked.wait(30)
        return find(*arguments, **options)

    monkeypatch.setattr(type(service.operations), "job", slow_find)
    answers: list[int] = []

    def read(name: str) -> None:
        answers.append(service.client.get(f"/v1/jobs/{name}/logs?follow=false", headers=headers).status_code)

    headers = {"Authorization": f"Bearer {service.token()}"}
    with service.client:
        threads = [threading.Thread(target=read, args=(name,)) for name in (job, "job-none", job)]
        for thread in threads:
            thread.start()
        while not answers:
            time.sleep(0.01)
        assert answers == [429]
        checked.set()
        for thread in threads:
            thread.join()
        assert len(answers) == 3
        assert set(answers) <= {200, 404, 429}
        for _ in range(3):
            read(job)
        assert answers[3:] == [200] * 3


def test_log_of_a_client_that_has_gone_counts_no_more() -> None:
    """It is gone before the first byte, so the stream itself never starts."""
    ended: list[bool] = []

    async def content() -> AsyncIterator[bytes]:
        yield b"never sent"

    async def send(message: Any) -> None:
        raise OSError("the client has gone")

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    response = LogResponse(content(), on_end=lambda: ended.append(True))
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        asyncio.run(response(scope, receive, send))
    assert ended == [True]


def test_jobs_that_are_stopped_at_once_have_a_limit(service: Service) -> None:
    """Such jobs are finished, so nothing else limits their number, and each is three events or more. The limit ends
    if the clock is set back."""
    now, statuses = time.time(), []
    service.operations.clock = lambda: now
    for _ in range(MAX_NEW + 2):
        status, content = service.call("POST", body=APPLY)
        statuses.append(status)
        if status == 202:
            service.call("DELETE", f"/v1/jobs/{content['id']}")
            service.check()
    assert statuses == [202] * MAX_NEW + [429] * 2
    assert service.call("POST", body=APPLY, subject="bob")[0] == 202
    for moved_s in (-24 * 3600, 0.0):
        service.operations.clock = lambda moved_s=moved_s: now + moved_s
        assert service.call("POST", body=APPLY)[0] == 202
