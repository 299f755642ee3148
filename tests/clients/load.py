"""Closed-loop HTTP load from Python: so many connections, kept alive, each with one request under way.

Each answer is kept with what became of it, so that it can be held against logs afterwards. As an HTTP client does, it
sends nothing twice: a connection that ends between two requests is opened again, one that ends within one is a failure.

    python -m tests.clients.load URL REQUESTS_FILE CONNECTIONS SECONDS   # what benches use without wrk
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
"""Longer than the edge waits for a replica, so that it is the edge that gives up."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    began: float
    """Monotonic seconds."""
    took_s: float
    status: int
    """0 where no whole answer came."""
    body: bytes
    """Of the answer, or what went wrong."""


@dataclass(kw_only=True)
class Load:
    """Requests that go on until told to stop."""

    url: str
    requests: Callable[[], tuple[dict[str, str], bytes]]
    """Headers and body of the next request."""
    context: ssl.SSLContext | None = None
    per_s: float | None = None
    """Of all connections together at most; none is as fast as answers come."""
    answers: list[Answer] = field(default_factory=list)
    stopped: bool = False

    async def run(self, *, connections: int) -> None:
        """Send and wait, until `stopped`."""
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
        """Status, body, and whether the connection stays open."""
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
    """A chunked body (RFC 9112, section 7.1); extensions and trailers are passed over."""
    content = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        content += await reader.readexactly(size)
        await reader.readexactly(2)
    while await reader.readline() not in (b"\r\n", b""):
        pass
    return bytes(content)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of all do not exceed."""
    return sorted(values)[min(int(len(values) * percent / 100), len(values) - 1)]


def from_file(path: Path) -> Iterator[tuple[dict[str, str], bytes]]:
    """Headers, `name:value;…`, and bodies, a tab between them."""
    for line in path.read_text().splitlines():
        headers, _, body = line.partition("\t")
        yield dict(one.split(":", 1) for one in headers.split(";")), body.encode()


async def main(url: str, file: str, connections: str, seconds: str) -> None:
    """Measure for a while, and print what wrk's script prints."""
    requests = itertools.cycle(list(from_file(Path(file))))
    context = ssl.create_default_context() if url.startswith("https:") else None
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # wrk does not look at it either
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
