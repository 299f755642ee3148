"""Tests of a job's log."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from jobs.submission import logs
from tests.unit.jobs.submission.conftest import record

if TYPE_CHECKING:
    from tests.unit.jobs.submission.conftest import Service

RAYS_LINES = (
    b"INFO job_manager.py:581 -- Runtime env is setting up.\nRunning entrypoint for job j: cd /root\n"
)


def test_log_is_followed_until_the_job_ends(service: Service) -> None:
    """A stream starts at a position, and has all that was printed before the end."""
    path = logs.log_file(record(service.root), "j")
    path.parent.mkdir(parents=True)
    path.write_bytes(RAYS_LINES + b"one\n")
    asked = iter((False, False, False, True))

    def is_over() -> bool:
        over = next(asked)
        with path.open("ab") as file:
            file.write(b"more\n")
        return over

    async def read(*, offset: int, follow: bool) -> bytes:
        stream = logs.stream(path, offset=offset, is_over=is_over, follow=follow)
        return b"".join([data async for data in stream])

    assert asyncio.run(read(offset=0, follow=False)) == b"one\nmore\n"
    assert asyncio.run(read(offset=2, follow=True)) == b"e\n" + b"more\n" * 4
    path.write_bytes(RAYS_LINES[:50])  # Ray's last line is not there yet
    asked = iter((False, False, True))
    assert asyncio.run(read(offset=0, follow=False)) == b""
    assert asyncio.run(read(offset=0, follow=True)) == RAYS_LINES[:50] + b"more\n" * 3
    missing = logs.stream(path.with_name("none"), offset=0, is_over=lambda: True, follow=True)
    assert asyncio.run(anext(missing, None)) is None  # type: ignore[arg-type]


def test_log_over_http(service: Service) -> None:
    """The log is plain text, from the position that the client names."""
    job = service.submit()
    path = logs.log_file(record(service.root), job)
    path.parent.mkdir(parents=True)
    path.write_bytes(RAYS_LINES + b"<b>hello</b>\n")
    service.finish(job)
    headers = {"Authorization": f"Bearer {service.token()}"}
    answer = service.client.get(f"/v1/jobs/{job}/logs?offset=3", headers=headers)
    assert (answer.text, answer.headers["content-type"]) == ("hello</b>\n", "text/plain; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
