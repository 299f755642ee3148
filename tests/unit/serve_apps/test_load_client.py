"""The Python load client reads every form of an answer."""

from __future__ import annotations

import asyncio

from tests.clients.load import Answer, Load

CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    b'8;note=x\r\n{"a": 1,\r\n8\r\n "b": 2}\r\n0\r\nx-trailer: t\r\n\r\n'
)
WITH_LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


async def _answers(answer: bytes, *, count: int) -> list[Answer]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    load = Load(url=f"http://127.0.0.1:{port}/x", requests=lambda: ({}, b"{}"))
    running = asyncio.create_task(load.run(connections=1))
    while len(load.answers) < count:
        await asyncio.sleep(0)
    load.stopped = True
    await running
    server.close()
    return load.answers[:count]


def test_chunked_and_sized_answers_are_read_whole_on_one_connection() -> None:
    """The second answer starts where the first ended, trailers included."""
    for answer, body in ((CHUNKED, b'{"a": 1, "b": 2}'), (WITH_LENGTH, b"{}")):
        got = asyncio.run(_answers(answer, count=3))
        assert [(one.status, one.body) for one in got] == [(200, body)] * 3
