"""One controller for each edge: a second one that is started asks the first to hand over, so that an edge is restarted
by starting it again.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigError

SIGNAL = signal.SIGUSR1
DEADLINE_S = 20.0
POLL_S = 0.02


@contextmanager
def sole_controller(file: Path) -> Iterator[None]:
    """Be the one that holds a lock file, after the one before has let it go.

    Raises:
        ConfigError: it did not, within 20 s.
    """
    with file.open("a+") as lock:
        if not _taken(lock.fileno()):
            _ask(file)
            deadline = time.monotonic() + DEADLINE_S
            while not _taken(lock.fileno()):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"The edge's controller {file.read_text().strip()} does not hand over. End it first."
                    )
                time.sleep(POLL_S)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(file: Path) -> None:
    """Tell the process that holds the lock; it wrote its pid when it took it."""
    if text := file.read_text().strip():
        os.kill(int(text), SIGNAL)
