"""An answer's head and body leave a replica in one write.

Uvicorn writes each of the two by itself. On loopback a write is dearer than the whole rest of what uvicorn does, and it
wakes the edge, which then has half an answer. There is no setting for it, and Serve gives no choice of server, so the
class that writes is exchanged here.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http import httptools_impl

Message = Any
"""Of ASGI."""


class _Collected:
    """Stands for a transport while an answer is put together."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def close(self) -> None:
        self.closed = True


class _OneWrite(httptools_impl.RequestResponseCycle):
    """A request and its answer, whose head waits for the first of the body."""

    _head: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._head = message  # the last one counts: uvicorn's own 500, where the body never comes
            return
        head, self._head = self._head, None
        if head is None:
            await super().send(message)
            return
        transport, collected = self.transport, _Collected()
        self.transport = collected  # type: ignore[assignment]  # all of a transport that `send` needs
        try:
            await super().send(head)
            await super().send(message)
        finally:
            self.transport = transport
            if collected.parts:
                transport.write(b"".join(collected.parts))
            if collected.closed:
                transport.close()


def answer_in_one_write() -> None:
    """Have servers that start after this in the process do so."""
    vars(httptools_impl)["RequestResponseCycle"] = _OneWrite
