"""The log of a job, as a stream of bytes. Ray writes it to a file on the head, where the job service runs too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from cluster.session import ClusterRecord

CHUNK = 64 * 1024
POLL_S = 0.5
MAX_SILENT_S = 1800.0
"""A stream without new output for this time ends, because a client may have vanished without a word. Another one asks
again, with the position that it has reached."""


def log_file(record: ClusterRecord, job: str) -> Path:
    """Return the file that Ray writes a job's output to. It exists as soon as the job has started."""
    return Path(record.temp_dir) / "session_latest" / "logs" / f"job-driver-{job}.log"


async def stream(
    path: Path, *, offset: int, is_over: Callable[[], bool], follow: bool
) -> AsyncIterator[bytes]:
    """Yield the content of a log from a position on.

    Args:
        path: the file. A missing file is an empty log.
        offset: position in bytes.
        is_over: whether the job has ended.
        follow: go on until the job has ended and all its output was sent.
    """
    silent_s = 0.0
    while True:
        ended = not follow or await asyncio.to_thread(
            is_over
        )  # before the read, so that the last output is read
        while data := await asyncio.to_thread(_read, path, offset):
            offset, silent_s = offset + len(data), 0.0
            yield data
        if ended or silent_s >= MAX_SILENT_S:
            return
        await asyncio.sleep(POLL_S)
        silent_s += POLL_S


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)
    except FileNotFoundError:
        return b""
