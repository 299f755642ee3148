"""Locks of a cluster: only one command at a time can change the cluster, and only one supervisor can watch it.

Without the lock, two `cluster.up` at the same time would start two clusters, or end each other's processes. The
kernel releases a lock when its process ends, also if the process was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from cluster.errors import ConfigError
from cluster.session import record_path
from cluster.settings import StorageConfig

COMMAND_LOCK, SUPERVISOR_LOCK, CONTAINER_LOCK = "cluster.lock", "supervisor.lock", "container.lock"


def command_lock(storage: StorageConfig) -> AbstractContextManager[None]:
    """Hold the lock for starting, repairing or ending a storage root's cluster.

    Raises:
        ConfigError: Another command holds the lock.
    """
    return hold_lock(
        _path(storage, COMMAND_LOCK),
        "Another `cluster.up` or `cluster.down` (pid {pid}) is running for {folder}. Wait until it has ended.",
    )


def supervisor_lock(storage: StorageConfig) -> AbstractContextManager[None]:
    """Hold the lock of the supervisor of a storage root's cluster.

    Raises:
        ConfigError: Another supervisor holds the lock.
    """
    return hold_lock(
        _path(storage, SUPERVISOR_LOCK),
        "Another supervisor (pid {pid}) already watches the cluster of {folder}. `python -m cluster.status` shows it.",
    )


def container_lock(storage: StorageConfig) -> AbstractContextManager[None]:
    """Hold the lock of the container that runs a storage root's cluster.

    A second container sees no processes of the first one. It would take the first cluster for a dead one.

    Raises:
        ConfigError: Another container holds the lock.
    """
    return hold_lock(
        _path(storage, CONTAINER_LOCK),
        "Another container runs the cluster of {folder}. Stop it first, or give this one its own volume.",
    )


def is_watched_by(storage: StorageConfig, pid: int) -> bool:
    """Return whether a process holds the supervisor's lock."""
    return _holder(_path(storage, SUPERVISOR_LOCK)) == str(pid)


@contextlib.contextmanager
def hold_lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a file that only its owner may open. It is created if it does not exist.

    Args:
        path: The file.
        refusal: Message if another process holds the lock. `{pid}` and `{folder}` are replaced.

    Raises:
        ConfigError: Another process holds the lock, or the folder cannot be created.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder {path.parent} cannot be created: {error.strerror}. Set storage.local to a folder on this "
            "machine's disk."
        ) from None
    with _locked(path) as acquired:
        if not acquired:
            raise ConfigError(refusal.format(pid=_holder(path), folder=path.parent))
        yield


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
