"""Locks of a cluster: one command at a time changes it, and one supervisor watches it.

Two `cluster.up` at once would start two clusters, or end what the other started. A lock ends with its process, so a
killed one leaves nothing locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError
from cluster.session import record_path
from cluster.settings import StorageConfig

CHANGING, WATCHING = "cluster.lock", "supervisor.lock"


@contextlib.contextmanager
def changing(storage: StorageConfig) -> Iterator[None]:
    """Be alone in starting, repairing or ending a storage root's cluster.

    Raises:
        ConfigError: another command is at it.
    """
    path = _path(storage, CHANGING)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path) as taken:
        if not taken:
            raise ConfigError(
                f"Another `cluster.up` or `cluster.down` (pid {_holder(path)}) is at work for {path.parent}. Wait "
                "until it has ended."
            )
        yield


@contextlib.contextmanager
def sole_supervisor(storage: StorageConfig) -> Iterator[None]:
    """Be the one supervisor of a storage root's cluster.

    Raises:
        ConfigError: there is one.
    """
    path = _path(storage, WATCHING)
    with _locked(path) as taken:
        if not taken:
            raise ConfigError(
                f"A supervisor (pid {_holder(path)}) watches the cluster of {path.parent} already; "
                "`python -m cluster.status` shows it."
            )
        yield


def is_watched_by(storage: StorageConfig, pid: int) -> bool:
    """Whether a process has become the supervisor."""
    return _holder(_path(storage, WATCHING)) == str(pid)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    # Whoever can read a file can lock it, so nobody else may open it.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "a+") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name on it
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield True


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _path(storage: StorageConfig, name: str) -> Path:
    return Path(record_path(storage)).with_name(name)
