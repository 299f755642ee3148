"""Closed-loop HTTP load from Python: a fixed number of keep-alive connections, each with one open request at a time.

Each answer is stored, so that tests can compare the answers with logs later. The client never sends a request twice. If
a connection ends between two requests, it is opened again. If it ends during a request, this request has failed.

    python -m tests.clients.load URL REQUESTS_FILE CONNECTIONS SECONDS   # benchmarks use this without wrk
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 40.0
"""Timeout for one answer in seconds. It is longer than the edge waits for a replica, so the edge times out first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one request."""

    began: float
    """Start time in monotonic seconds."""
    took_s: float
    status: int
    """HTTP status, or 0 if no complete answer came."""
    body: bytes
    """Body of the answer, or the error."""


@dataclass(kw_only=True)
class Load:
    """Sends requests until `stopped` is set."""

    url: str
    requests: Callable[[], tuple[dict[str, str], bytes]]
    """Function that returns the headers and body of the next request."""
    context: ssl.SSLContext | None = None
    per_s: float | None = None
    """Highest rate of all connections together, in requests per second. None means no limit."""
    answers: list[Answer] = field(default_factory=list)
    stopped: bool = False

    async def run(self, *, connections: int) -> None:
        """Send requests and wait for answers, until `stopped` is set."""
        pause = connections / self.per_s if self.per_s else 0.0
        await asyncio.gather(*(self._connection(pause) for _ in range(connections)))

    async def _connection(self, pause_s: float) -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        due = time.monotonic()
        while not self.stopped:
            headers, body = self.requests()
            if streams is not None and streams[0].at_eof():
                streams[1].close()
                streams = None
            began = time.monotonic()
            try:
                streams = streams or await self._open()
                async with asyncio.timeout(TIMEOUT_S):
                    status, content, stays = await self._exchange(*streams, headers, body)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                status, content, stays = 0, repr(error).encode(), False
            self.answers.append(Answer(began, time.monotonic() - began, status, content))
            if not stays and streams is not None:
                streams[1].close()
                streams = None
            due = max(due + pause_s, time.monotonic() - pause_s)
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
        if streams is not None:
            streams[1].close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self.url)
        return await asyncio.open_connection(address.hostname, address.port, ssl=self.context)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str], body: bytes
    ) -> tuple[int, bytes, bool]:
        """Return status, body, and whether the connection stays open."""
        address = urlsplit(self.url)
        given = {"host": address.netloc, "content-length": str(len(body)), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        writer.write(f"POST {address.path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        answered = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
        if "chunked" in answered.get("transfer-encoding", "").lower():
            content = await _read_chunks(reader)
        else:
            content = await reader.readexactly(int(answered["content-length"]))
        return int(head[0].split(" ", 2)[1]), content, answered.get("connection") != "close"


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """Read a chunked body (RFC 9112, section 7.1). Extensions and trailers are ignored."""
    content = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        content += await reader.readexactly(size)
        await reader.readexactly(2)
    while await reader.readline() not in (b"\r\n", b""):
        pass
    return bytes(content)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile of the values: `percent` percent of them are not larger."""
    return sorted(values)[min(int(len(values) * percent / 100), len(values) - 1)]


def from_file(path: Path) -> Iterator[tuple[dict[str, str], bytes]]:
    """Yield the headers and the body of each line: `name:value;...`, a tab, and the body."""
    for line in path.read_text().splitlines():
        headers, _, body = line.partition("\t")
        yield dict(one.split(":", 1) for one in headers.split(";")), body.encode()


async def main(url: str, file: str, connections: str, seconds: str) -> None:
    """Send requests for some seconds, and print the same figures as the script for wrk."""
    requests = itertools.cycle(list(from_file(Path(file))))
    context = ssl.create_default_context() if url.startswith("https:") else None
    if context is not None:
        context.check_hostname, context.verify_mode = (
            False,
            ssl.CERT_NONE,
        )  # wrk does not verify certificates either
    load = Load(url=url, requests=lambda: next(requests), context=context)
    began = time.monotonic()
    running = asyncio.create_task(load.run(connections=int(connections)))
    await asyncio.sleep(float(seconds))
    load.stopped = True
    await running
    took_us = [answer.took_s * 1e6 for answer in load.answers]
    said = {
        "count": len(took_us),
        "took_us": round((time.monotonic() - began) * 1e6),
        "p50_us": percentile(took_us, 50),
        "p99_us": percentile(took_us, 99),
        "errors": sum(not 200 <= answer.status < 300 for answer in load.answers),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
