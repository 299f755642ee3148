"""HTTP interface of submitted jobs, behind the edge: `/v1/jobs`, `/v1/jobs/{id}` and `/v1/jobs/{id}/logs`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cluster.errors import AccessDenied, FalajError, InvalidRequest, RefusedError, Unauthenticated
from cluster.host.http_socket import BodyRefused, error_response, plain_error, read_json
from cluster.security.authorization.policy import Action
from cluster.security.tokens.principal import Principal
from cluster.session import ClusterRecord
from jobs.submission import logs
from jobs.submission.errors import JobForbidden, JobNotFound, KeyTaken, TooManyJobs
from jobs.submission.limits import InProgress
from jobs.submission.metrics import JobMetrics
from jobs.submission.operations import JobOperations
from jobs.submission.requests import as_json

MAX_BODY_BYTES = 64 * 1024
MAX_FOLLOWERS = 8
"""Largest number of logs that one caller may follow at the same time."""
MAX_ALL_FOLLOWERS = 64
"""The same, for all callers."""
MAX_SUBMITTING = 4
"""Largest number of submissions of one caller that wait for their check or are checked at the same time."""
MAX_ALL_SUBMITTING = 32
"""The same, for all callers."""
CHECKERS = 2
"""Threads that check submissions. A check takes up to seconds, so these requests have threads of their own: the others,
such as stopping a job, do not wait for them."""
OFFSET = "x-log-offset"
"""Header of a log's answer: position of its first byte."""
LOG = logging.getLogger("falaj.jobs")
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (Unauthenticated, 401),
    (AccessDenied, 403),
    (JobForbidden, 403),
    (JobNotFound, 404),
    (KeyTaken, 409),
    (TooManyJobs, 429),
    (RefusedError, 400),
)
"""The status of each error. The first class that fits decides."""


class LogResponse(StreamingResponse):
    """A stream that calls `on_end` once, also if the client has gone before its first byte."""

    def __init__(self, content: AsyncIterator[bytes], *, on_end: Callable[[], None], **options: Any) -> None:
        super().__init__(content, **options)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class JobApi:
    """The application's endpoints.

    Args:
        operations: what callers do with jobs.
        record: the running cluster, whose head has the logs.
        metrics: counts requests.
    """

    def __init__(self, operations: JobOperations, record: ClusterRecord, metrics: JobMetrics) -> None:
        self._operations = operations
        self._record = record
        self._metrics = metrics
        self._following = InProgress(MAX_FOLLOWERS, most_of_all=MAX_ALL_FOLLOWERS, of_what="logs")
        self._submitting = InProgress(MAX_SUBMITTING, most_of_all=MAX_ALL_SUBMITTING, of_what="submissions")
        self._checkers = ThreadPoolExecutor(CHECKERS, thread_name_prefix="check")

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/jobs", self._endpoint("submit", self._submit), methods=["POST"]),
                Route("/v1/jobs", self._endpoint("list", self._list), methods=["GET"]),
                Route("/v1/jobs/{job}", self._endpoint("show", self._show), methods=["GET"]),
                Route("/v1/jobs/{job}", self._endpoint("stop", self._stop), methods=["DELETE"]),
                Route("/v1/jobs/{job}/logs", self._endpoint("logs", self._logs), methods=["GET"]),
            ],
            exception_handlers={404: plain_error, 405: plain_error},
        )

    async def _submit(self, request: Request) -> Response:
        principal = await self._principal(request)
        body = await read_json(request, max_bytes=MAX_BODY_BYTES)
        self._submitting.begin(principal.subject)
        check = asyncio.get_running_loop().run_in_executor(
            self._checkers, self._operations.submit, principal, body
        )
        # Also if the client has gone.
        check.add_done_callback(lambda _: self._submitting.end(principal.subject))
        accepted = await check
        state = await asyncio.to_thread(self._operations.state, accepted.job.id)
        content = {"id": accepted.job.id, "status": state.status}
        return JSONResponse(content, status_code=202 if accepted.is_new else 200)

    async def _list(self, request: Request) -> Response:
        principal = await self._principal(request)
        count = _number(request, "limit", default=50)
        found = await asyncio.to_thread(self._operations.jobs, principal, count=count)
        return JSONResponse({"jobs": [as_json(job, state) for job, state in found]})

    async def _show(self, request: Request) -> Response:
        principal = await self._principal(request)
        job = await asyncio.to_thread(self._operations.job, principal, request.path_params["job"])
        return JSONResponse(as_json(job, await asyncio.to_thread(self._operations.state, job.id)))

    async def _stop(self, request: Request) -> Response:
        principal, job = await self._principal(request), request.path_params["job"]
        state = await asyncio.to_thread(self._operations.stop, principal, job)
        return JSONResponse({"id": job, "status": state.status}, status_code=200 if state.is_over else 202)

    async def _logs(self, request: Request) -> Response:
        principal, name = await self._principal(request), request.path_params["job"]
        offset, follow = _number(request, "offset", default=0), _flag(request, "follow", default=True)
        self._following.begin(principal.subject)
        try:
            job = await asyncio.to_thread(self._operations.job, principal, name, action=Action.control_jobs)
        except BaseException:
            self._following.end(principal.subject)
            raise
        content = logs.stream(
            logs.log_file(self._record, job.id),
            offset=offset,
            is_over=lambda: self._operations.state(job.id).is_over,
            follow=follow,
        )
        return LogResponse(
            _without_errors(content),
            media_type="text/plain; charset=utf-8",
            headers={OFFSET: str(offset), "cache-control": "no-store", "x-content-type-options": "nosniff"},
            on_end=lambda: self._following.end(principal.subject),
        )

    async def _principal(self, request: Request) -> Principal:
        sent = request.headers.getlist("authorization")
        if len(sent) > 1:
            raise InvalidRequest("Send only one Authorization header.")
        return await asyncio.to_thread(self._operations.authenticate, sent[0] if sent else None)

    def _endpoint(
        self, operation: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await handler(request)
            except ClientDisconnect:
                response = error_response(400, "The client closed the connection.")
            except Exception as error:  # noqa: BLE001 - every error is answered, and unknown ones are logged
                response = error_answer(error)
            self._metrics.seconds.labels(operation).observe(time.perf_counter() - started)
            self._metrics.requests.labels(operation, str(response.status_code)).inc()
            return response

        return endpoint


def error_answer(error: Exception) -> Response:
    """Return the JSON answer to an error. It has no stack trace."""
    if isinstance(error, BodyRefused):
        return error_response(error.status, str(error))
    for kind, status in _STATUS:
        if isinstance(error, kind):
            message = error.public if isinstance(error, RefusedError) else str(error)
            return error_response(status, message)
    if isinstance(error, (sa.exc.SQLAlchemyError, FalajError, OSError)):
        LOG.warning("a request could not be answered: %s", type(error).__name__)
        return error_response(503, "The job service cannot reach the ledger or the key store. Try again.")
    LOG.error("a request failed", exc_info=error)
    return error_response(500, "The job service failed.")


async def _without_errors(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a log's bytes. An error ends the stream early, and the client asks again from its position."""
    try:
        async for data in content:
            yield data
    except (sa.exc.SQLAlchemyError, OSError) as error:
        LOG.warning("a log ended early: %s", type(error).__name__)


def _number(request: Request, name: str, *, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise InvalidRequest(f"'{name}' must be a whole number that is not negative.")
    return int(text)


def _flag(request: Request, name: str, *, default: bool) -> bool:
    text = request.query_params.get(name, str(default).lower())
    if text not in ("true", "false"):
        raise InvalidRequest(f"'{name}' must be true or false.")
    return text == "true"
