"""Locks of a cluster: only one command at a time can change the cluster, and only one supervisor can watch it.

Without the lock, two `cluster.up` at the same time would start two clusters, or end each other's processes. The
kernel releases a lock when its process ends, also if the process was killed.
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

COMMAND_LOCK, SUPERVISOR_LOCK = "cluster.lock", "supervisor.lock"


@contextlib.contextmanager
def command_lock(storage: StorageConfig) -> Iterator[None]:
    """Hold the lock for starting, repairing or ending a storage root's cluster.

    Raises:
        ConfigError: Another command holds the lock.
    """
    path = _path(storage, COMMAND_LOCK)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path) as acquired:
        if not acquired:
            raise ConfigError(
                f"Another `cluster.up` or `cluster.down` (pid {_holder(path)}) is running for {path.parent}. Wait "
                "until it has ended."
            )
        yield


@contextlib.contextmanager
def supervisor_lock(storage: StorageConfig) -> Iterator[None]:
    """Hold the lock of the supervisor of a storage root's cluster.

    Raises:
        ConfigError: Another supervisor holds the lock.
    """
    path = _path(storage, SUPERVISOR_LOCK)
    with _locked(path) as acquired:
        if not acquired:
            raise ConfigError(
                f"Another supervisor (pid {_holder(path)}) already watches the cluster of {path.parent}. "
                "`python -m cluster.status` shows it."
            )
        yield


def is_watched_by(storage: StorageConfig, pid: int) -> bool:
    """Return whether a process holds the supervisor's lock."""
    return _holder(_path(storage, SUPERVISOR_LOCK)) == str(pid)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    # A process that can open a file can also lock it, so only the owner may open the lock file.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "a+") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        with contextlib.suppress(OSError):  # the disk is full: the lock works without the pid
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
