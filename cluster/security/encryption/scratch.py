"""Folders for temporary plaintext. They are in memory if there is room, and are removed even if their owner is killed.

A model is unencrypted until it is sealed, and a model may reveal its training data. A process removes its folder when
it ends. A killed process cannot do this. So each owner holds a lock on its folder, and the next process that creates a
folder with the same parent removes the folders that are not locked. Locks need no clock and no process id, and work
across the machines of a shared file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError
from cluster.security.encryption.disks import MEMORY_FILE_SYSTEMS, find_mount
from cluster.security.private_folder import find_exposure, remove_access_of_others

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (holds a private folder of this user)
MIN_FREE_BYTES = 2**30
"""Free bytes that shared memory must have. Ray's objects are there too, and a full shared memory ends Ray's
processes."""
PREFIX = "run-"
_LOCK, _OWNER = ".lock", ".owner"
_FORMER_PREFIX, _FORMER_AGE_S = "tmp", 86_400


def memory_folder(*, otherwise: Path) -> Path:
    """Return this user's folder in shared memory, or `otherwise` if there is no or too little shared memory."""
    folder = SHARED_MEMORY / f"falaj-{os.geteuid()}"
    try:
        mount = find_mount(SHARED_MEMORY)
        if mount is None or mount.kind not in MEMORY_FILE_SYSTEMS:
            return otherwise
        if shutil.disk_usage(SHARED_MEMORY).free < MIN_FREE_BYTES:
            return otherwise
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return otherwise
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return folder if is_own and not stat.S_IMODE(status.st_mode) & 0o077 else otherwise


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Yield a new folder below `parent` for this process, and remove it at the end.

    Folders of killed processes are removed first.

    Raises:
        ConfigError: `parent` belongs to another user, who could read or replace the files in it.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_access_of_others(parent)
    if (problem := find_exposure(parent)) is not None:
        raise ConfigError(f"{problem}, so nothing is written there. Remove it, or ask its owner to do so.")
    with _locked_parent(parent):
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        owner = _open_locked(folder / _OWNER, fcntl.LOCK_EX)
    inner = folder / "files"
    inner.mkdir(mode=0o700)
    try:
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of killed processes below `parent`."""
    if parent.is_dir():
        with _locked_parent(parent):
            _sweep(parent)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            owner = _open_locked(folder / _OWNER, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # the owner is alive, or another process is removing the folder
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)
    for folder in parent.glob(f"{_FORMER_PREFIX}*"):  # earlier releases used no locks
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime < time.time() - _FORMER_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked_parent(parent: Path) -> Iterator[None]:
    """Lock the parent folder, so that a new folder is not removed before its owner has locked it."""
    lock = _open_locked(parent / _LOCK, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _open_locked(path: Path, operation: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
