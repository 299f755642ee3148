"""One controller for each edge: a second one that is started asks the first to hand over, so that an edge is restarted
by starting it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.errors import ConfigError

SIGNAL = signal.SIGUSR1
DEADLINE_S = 20.0
POLL_S = 0.02


@contextlib.contextmanager
def sole_controller(file: Path) -> Iterator[None]:
    """Be the one that holds a lock file, after the one before has let it go.

    Raises:
        ConfigError: it did not, within 20 s.
    """
    with file.open("a+") as lock:
        deadline, asked = time.monotonic() + DEADLINE_S, ""
        while not _taken(lock.fileno()):
            if (holder := file.read_text().strip()) != asked:
                _ask(holder, file)
                asked = holder
            if time.monotonic() > deadline:
                raise ConfigError(f"The edge's controller {holder} does not hand over. End it first.")
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


def _ask(holder: str, file: Path) -> None:
    """Tell the process that holds the lock, by the pid that it wrote when it took it.

    Between the two the file still has its predecessor's, which may be nobody's by now or somebody else's: only who has
    the file open is told.
    """
    if not holder.isdecimal():
        return
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(int(holder))
        if any(opened.path == str(file.resolve()) for opened in process.open_files()):
            process.send_signal(SIGNAL)
