"""Send an answer's head and body in one write.

Uvicorn writes head and body separately. On loopback, a write takes more time than everything else that uvicorn does.
And the first write wakes the edge, although the body has not been written yet. Uvicorn has no setting for this, and
Serve offers no other server. So this module replaces uvicorn's class that writes.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http import httptools_impl

Message = Any
"""An ASGI message."""


class _Collector:
    """Replaces a transport, and stores the data that is written to it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def close(self) -> None:
        self.closed = True


class _OneWrite(httptools_impl.RequestResponseCycle):
    """Uvicorn's request and answer. The head is not written before the first part of the body."""

    _head: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._head = message  # a later head replaces this one: uvicorn's own 500, if there is no body
            return
        head, self._head = self._head, None
        if head is None:
            await super().send(message)
            return
        transport, collector = self.transport, _Collector()
        self.transport = collector  # type: ignore[assignment]  # it has every method that `send` calls
        try:
            await super().send(head)
            await super().send(message)
        finally:
            self.transport = transport
            if collector.parts:
                transport.write(b"".join(collector.parts))
            if collector.closed:
                transport.close()


def answer_in_one_write() -> None:
    """Make all servers that this process starts later send an answer in one write."""
    vars(httptools_impl)["RequestResponseCycle"] = _OneWrite
