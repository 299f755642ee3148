"""One command at a time works on a run. The kernel releases the lock when the command ends, also if it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import ConfigError


@contextlib.contextmanager
def run_lock(folder: Path, run: str) -> Iterator[None]:
    """Hold the lock of a run on this machine.

    Args:
        folder: Private folder for the lock.
        run: Id of the run.

    Raises:
        ConfigError: Another command works on the run.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"score-{hashlib.sha256(run.encode()).hexdigest()[:16]}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"Another command works on run '{run}'. Wait until it has ended.") from error
        yield
    finally:
        os.close(descriptor)
