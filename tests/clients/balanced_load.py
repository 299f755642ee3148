"""Requests at a constant rate through a small load balancer, as clients of several edges send them.

The rate does not depend on the answers: a slow server gets the next request all the same. The balancer asks each server
for its health twice a second, and leaves out a server that did not answer twice. It never sends a request again: each
request is sent to one server, and has one recorded result.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp

TIMEOUT_S = 10.0
"""Timeout of a request in seconds."""
CHECK_EVERY_S = 0.5
CHECK_TIMEOUT_S = 1.0
FALL = 2
"""Number of failed health checks in a row after which a server gets no requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request and its result."""

    kind: str
    number: int
    """Number of the request among all of its kind."""
    server: str
    at: float
    """Time of sending, in monotonic seconds."""
    took_s: float
    status: int
    """HTTP status, or 0 if no complete answer came."""
    content: Any
    """JSON of the answer, or the error as text."""

    @property
    def is_good(self) -> bool:
        return self.status == 200

    @property
    def answered_at(self) -> float:
        return self.at + self.took_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Requests of one kind."""

    path: str
    per_s: float
    body: Callable[[int], dict[str, Any]]
    """Returns the body of a request from its number."""


@dataclass(kw_only=True)
class BalancedLoad:
    """Context manager that sends requests in a thread of its own.

    Args:
        servers: base URL by name.
        health_path: path that a server answers with 200 while it can serve.
        kinds: requests by name of the kind.
        headers: returns the headers of each request from its number.
        authority: file with the certificate of the servers' authority; None for plain HTTP.
        connections: largest number of open connections; 0 sets no limit. A request waits for one of them, and this
            time is part of its duration.
    """

    servers: Mapping[str, str]
    health_path: str
    kinds: Mapping[str, Kind]
    headers: Callable[[int], dict[str, str]]
    authority: str | None = None
    connections: int = 0
    sent: list[Sent] = field(default_factory=list)
    _healthy: dict[str, bool] = field(default_factory=dict)
    _stopped: bool = False
    _error: BaseException | None = None

    def __enter__(self) -> BalancedLoad:
        self._healthy = dict.fromkeys(self.servers, True)
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopped = True
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def healthy(self) -> list[str]:
        """Return the names of the servers that get requests now."""
        return [name for name, is_healthy in self._healthy.items() if is_healthy]

    def _run(self) -> None:
        try:
            asyncio.run(self._send_all())
        except BaseException as error:  # noqa: BLE001 (it belongs to the thread that started this one)
            self._error = error

    async def _send_all(self) -> None:
        tls = ssl.create_default_context(cafile=self.authority) if self.authority else False
        connector = aiohttp.TCPConnector(ssl=tls, limit=self.connections, keepalive_timeout=30)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=True) as session:
            checks = [asyncio.create_task(self._check(session, name)) for name in self.servers]
            await asyncio.gather(*(self._send_kind(session, name) for name in self.kinds))
            for check in checks:
                check.cancel()

    async def _send_kind(self, session: aiohttp.ClientSession, name: str) -> None:
        kind, servers = self.kinds[name], list(self.servers)
        began, requests = time.monotonic(), set[asyncio.Task[None]]()
        for number in itertools.count():
            due = began + number / kind.per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self._stopped:
                break
            healthy = self.healthy() or servers
            server = healthy[number % len(healthy)]
            task = asyncio.create_task(self._send(session, name, number, server))
            requests.add(task)
            task.add_done_callback(requests.discard)
        await asyncio.gather(*requests)

    async def _send(self, session: aiohttp.ClientSession, name: str, number: int, server: str) -> None:
        kind, at = self.kinds[name], time.monotonic()
        try:
            async with session.post(
                f"{self.servers[server]}{kind.path}",
                data=json.dumps(kind.body(number)),
                headers=self.headers(number),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            ) as response:
                text = await response.text()
                status = response.status
            content = json.loads(text) if status == 200 else text[:300]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            status, content = 0, repr(error)
        self.sent.append(
            Sent(
                kind=name,
                number=number,
                server=server,
                at=at,
                took_s=time.monotonic() - at,
                status=status,
                content=content,
            )
        )

    async def _check(self, session: aiohttp.ClientSession, server: str) -> None:
        failed = 0
        while True:
            began = time.monotonic()
            try:
                timeout = aiohttp.ClientTimeout(total=CHECK_TIMEOUT_S)
                async with session.get(
                    f"{self.servers[server]}{self.health_path}", timeout=timeout
                ) as response:
                    failed = 0 if response.status == 200 else failed + 1
            except (aiohttp.ClientError, OSError, TimeoutError):
                failed += 1
            self._healthy[server] = failed < FALL
            await asyncio.sleep(max(0.0, began + CHECK_EVERY_S - time.monotonic()))
