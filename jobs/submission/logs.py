"""The log of a job, as a stream of bytes. Ray writes it to a file on the head, where the job service runs too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from cluster.session import ClusterRecord
from jobs.ray_jobs import LAST_LINE_OF_RAY

CHUNK = 64 * 1024
POLL_S = 0.5
MAX_SILENT_S = 1800.0
"""A stream without new output for this time ends, because its client may be gone. A client that is still there asks
again, with the position that it has reached."""


def log_file(record: ClusterRecord, job: str) -> Path:
    """Return the file that Ray writes a job's output to. It exists as soon as the job has started."""
    return Path(record.temp_dir) / "session_latest" / "logs" / f"job-driver-{job}.log"


async def stream(
    path: Path, *, offset: int, is_over: Callable[[], bool], follow: bool
) -> AsyncIterator[bytes]:
    """Yield what a job has printed, from a position on.

    Args:
        path: the file. A missing file is an empty log.
        offset: position in bytes, after Ray's own first lines.
        is_over: whether the job has ended.
        follow: go on until the job has ended and all its output was sent.
    """
    silent_s, start = 0.0, 0
    while True:
        is_ended = await asyncio.to_thread(is_over)  # before the read, so that the last output is read
        start = start or await asyncio.to_thread(_start, path)
        while (start or is_ended) and (data := await asyncio.to_thread(_read, path, start + offset)):
            offset, silent_s = offset + len(data), 0.0
            yield data
        if is_ended or not follow or silent_s >= MAX_SILENT_S:
            return
        await asyncio.sleep(POLL_S)
        silent_s += POLL_S


def _start(path: Path) -> int:
    """Return where the job's own output starts; 0 if Ray has not written its own lines yet."""
    head = _read(path, 0)
    last = head.find(LAST_LINE_OF_RAY.encode())
    return 0 if last < 0 else head.find(b"\n", last) + 1


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK)
    except FileNotFoundError:
        return b""
