"""Folders for what is in the clear for a while: in memory where there is room, and swept where their owner was killed.

A model lies open until it is sealed, and it may show what it learnt from. A process that ends removes its folder; one
that is killed cannot, so each folder is locked by its owner, and whoever makes the next one beside it removes those
that nobody holds any more. Locks need no clock and no pid, and hold across the machines of a shared file system.
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
from cluster.security.encryption.disks import MEMORY, mount_of
from cluster.security.private_folder import close_to_others, openness

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (a folder of one's own is made in it)
MIN_FREE_BYTES = 2**30
"""Ray's objects lie in shared memory, too; a full one would end them."""
PREFIX = "run-"
_LOCK, _OWNER = ".lock", ".owner"
_FORMER_PREFIX, _FORMER_AGE_S = "tmp", 86_400


def memory_folder(*, otherwise: Path) -> Path:
    """A folder of this user's own in shared memory; `otherwise` where there is none, or little room."""
    folder = SHARED_MEMORY / f"falaj-{os.geteuid()}"
    try:
        mount = mount_of(SHARED_MEMORY)
        if mount is None or mount.kind not in MEMORY:
            return otherwise
        if shutil.disk_usage(SHARED_MEMORY).free < MIN_FREE_BYTES:
            return otherwise
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return otherwise
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return folder if own and not stat.S_IMODE(status.st_mode) & 0o077 else otherwise


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder of this process's own below `parent`, gone at the end; what killed processes left is removed first.

    Raises:
        ConfigError: `parent` is another user's, who could read what is written there, or exchange it.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    close_to_others(parent)
    if (problem := openness(parent)) is not None:
        raise ConfigError(f"{problem}: nothing is written there. Remove it, or have its owner do so.")
    with _changing(parent):
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        owner = _locked(folder / _OWNER, fcntl.LOCK_EX)
    inner = folder / "files"
    inner.mkdir(mode=0o700)
    try:
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def sweep(parent: Path) -> None:
    """Remove what killed processes left below a folder."""
    if parent.is_dir():
        with _changing(parent):
            _sweep(parent)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            owner = _locked(folder / _OWNER, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its owner lives, or it is just being removed
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)
    for folder in parent.glob(f"{_FORMER_PREFIX}*"):  # earlier releases had no locks
        with contextlib.suppress(OSError):
            if folder.stat().st_mtime < time.time() - _FORMER_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _changing(parent: Path) -> Iterator[None]:
    """Alone with the folder: a new one is not swept before it is locked."""
    lock = _locked(parent / _LOCK, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _locked(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
