"""Send an answer's head and body in one write.

Uvicorn writes them separately. On loopback a write costs more than everything else that uvicorn does, and the first
write wakes the edge although the body is still missing. Uvicorn has no setting for it, and Serve has no choice of
servers, so this module replaces the class that writes.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http import httptools_impl

Message = Any
"""An ASGI message."""


class _Collector:
    """Replaces a transport, and collects what is written to it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def close(self) -> None:
        self.closed = True


class _OneWrite(httptools_impl.RequestResponseCycle):
    """Uvicorn's request and answer, with the head held back until the first part of the body."""

    _head: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._head = message  # a later head replaces it: uvicorn's own 500, if the body never comes
            return
        head, self._head = self._head, None
        if head is None:
            await super().send(message)
            return
        transport, collector = self.transport, _Collector()
        self.transport = collector  # type: ignore[assignment]  # it has all that `send` needs of a transport
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
    """Let servers that this process starts from now on send answers in one write."""
    vars(httptools_impl)["RequestResponseCycle"] = _OneWrite
