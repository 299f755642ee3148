"""The timeout of a body, without a timer for bodies that are ready."""

from __future__ import annotations

import asyncio
import http.client
import json
import select
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from cluster.runtime import InputSpec, ModelSignature, Task
from serve_apps.replica import http as http_module
from serve_apps.replica.timeouts import with_timeout
from tests.servers.replica import Replica, running_replica

SIGNATURE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="age", dtype="double"),), label="y")
BODIES = {
    "/v2/models/m/infer": b'{"inputs": [{"name": "age", "shape": [1], "datatype": "FP64", "data": [1.5]}]}',
    "/v1/models/m:predict": b'{"entities": [{"id": 1}], "features": {"age": 1.5}}',
}


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with running_replica(tmp_path_factory.mktemp("slow"), SIGNATURE) as running:
        yield running


def test_ready_result_needs_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result or error is returned. In this test, setting a timer would raise an error."""
    monkeypatch.setattr(asyncio, "timeout", None)

    async def work(error: Exception | None) -> str:
        if error is not None:
            raise error
        return "done"

    assert asyncio.run(with_timeout(0.0, work(None))) == "done"
    with pytest.raises(KeyError):
        asyncio.run(with_timeout(0.0, work(KeyError())))


def test_waiting_coroutine_continues_as_if_awaited() -> None:
    """Through any number of futures, sleeps and its own timeouts."""

    async def work() -> list[int]:
        found = []
        for number in range(3):
            await asyncio.sleep(0)
            future = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(future.set_result, number)
            found.append(await future)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        return found

    assert asyncio.run(with_timeout(10.0, work())) == [0, 1, 2]


async def _ended_by_time(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with pytest.raises(TimeoutError):
        await with_timeout(0.001, work())


async def _ended_from_outside(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    task = asyncio.create_task(with_timeout(10.0, work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("end", [_ended_by_time, _ended_from_outside], ids=["time", "outside"])
def test_cancelled_coroutine_can_clean_up(end: Callable[..., Coroutine[Any, Any, None]]) -> None:
    """After a timeout or a cancelled request, the coroutine gets the cancellation at the point where it waits."""
    seen = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            seen.append("cancelled")
            raise

    asyncio.run(end(work))
    assert seen == ["cancelled"]


@pytest.mark.parametrize("path", [*BODIES, "/v1/outcomes"])
def test_dripping_body_is_ended_in_time(replica: Replica, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """It is ended even if it arrives steadily. The error is JSON. A body in two parts within the time is answered."""
    monkeypatch.setattr(http_module, "BODY_TIMEOUT_S", 0.3)
    predicts = path in BODIES
    address = replica.address if predicts else replica.outcomes
    target = f"{replica.prefix if predicts else '/outcomes'}{path}"
    host, _, port = address.partition(":")
    lines = (f"POST {target} HTTP/1.1", "host: x", f"authorization: Bearer {replica.token()}")

    def begun_directly(length: int) -> socket.socket:
        connection = socket.create_connection((host, int(port)), timeout=10)
        connection.sendall("\r\n".join((*lines, f"content-length: {length}", "", "")).encode())
        return connection

    dripping = begun_directly(10_000)
    began = time.monotonic()
    while not select.select([dripping], [], [], 0.02)[0]:
        dripping.sendall(b" ")
        assert time.monotonic() < began + 5
    response = http.client.HTTPResponse(dripping)
    response.begin()
    content = json.loads(response.read())
    assert (content["code"], "0.3 s" in content["error"]) == (408, True)
    assert (response.status, response.headers["connection"]) == (408, "close")
    dripping.close()
    if predicts:
        good = BODIES[path]
        parted = begun_directly(len(good))
        parted.sendall(good[:5])
        assert not select.select([parted], [], [], 0.05)[0]
        parted.sendall(good[5:])
        assert parted.recv(100).startswith(b"HTTP/1.1 200")
        parted.close()


def test_body_that_came_with_its_head_needs_no_timer(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server has it when it calls the replica, so normal requests do not pay for slow ones."""
    waited = []

    async def noted(limit_s: float, work: Coroutine[Any, Any, Any]) -> Any:
        timeout = asyncio.timeout
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "timeout", lambda limit_s: waited.append(limit_s) or timeout(limit_s))
            return await with_timeout(limit_s, work)

    monkeypatch.setattr(http_module, "with_timeout", noted)
    path, good = next(iter(BODIES.items()))
    head = (f"POST {replica.prefix}{path} HTTP/1.1", "host: x", f"content-length: {len(good)}")
    lines = "\r\n".join((*head, f"authorization: Bearer {replica.token()}", "", "")).encode()
    host, _, port = replica.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(lines + good)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert waited == []
