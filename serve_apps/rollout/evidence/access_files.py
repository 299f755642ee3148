"""Files of access records: the edge creates them, one reader counts them, and they are removed after that.

HAProxy writes records to its standard output, so a file belongs to one HAProxy process, and rotation means a new
process; see `HAProxy.load`. A file is locked (`flock`) as long as any process has inherited it, so a kill -9 of a
writer completes its file as well. The name begins with the UTC time of the file's creation, to the nanosecond, so names
are in the order of time.
"""

from __future__ import annotations

import calendar
import contextlib
import fcntl
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """When a new file begins, and how long a complete one stays."""

    max_bytes: int = 256 * 2**20
    max_age_s: float = 86_400.0
    retention_s: float = 30 * 86_400.0
    """Time from a file's last record to its removal."""

    def is_due(self, path: Path) -> bool:
        """Return whether the writer of this file should begin a new one. An empty file is never too old."""
        try:
            status = path.stat()
        except FileNotFoundError:  # it was moved; new records would not be found
            return True
        age_s = time.time() - created_at(path, default=status.st_mtime)
        return status.st_size >= self.max_bytes or (status.st_size > 0 and age_s >= self.max_age_s)


DEFAULT_ROTATION = Rotation()


@contextlib.contextmanager
def new_file(folder: Path) -> Iterator[BinaryIO]:
    """Create a file for the standard output of one HAProxy.

    Raises:
        OSError: the file cannot be created, for example because the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()
    second = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 10**9))
    name = f"{second}-{now % 10**9:09}-{uuid.uuid4().hex[:8]}{SUFFIX}"
    with (folder / name).open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file


def created_at(path: Path, *, default: float) -> float:
    """Return the Unix time in a file's name; `default` if there is none."""
    try:
        return float(calendar.timegm(time.strptime(path.name.partition("-")[0], "%Y%m%dT%H%M%S")))
    except ValueError:
        return default


def list_files(folder: Path) -> list[Path]:
    """Return the files, the oldest first."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())


def is_complete(path: Path) -> bool:
    """Return whether no process can write to the file any more."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
