"""One controller for each edge: a new one asks the old one to hand over, so starting an edge again restarts it."""

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
    """Hold the lock file during the body, after its previous holder has released it.

    Raises:
        ConfigError: the previous holder did not release it within 20 s.
    """
    with file.open("a+") as lock:
        deadline, asked_pid = time.monotonic() + DEADLINE_S, ""
        while not _try_lock(lock.fileno()):
            if (holder_pid := file.read_text().strip()) != asked_pid:
                _request_handover(holder_pid, file)
                asked_pid = holder_pid
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"The edge's controller with pid {holder_pid} does not hand over. Stop it first."
                )
            time.sleep(POLL_S)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _request_handover(holder_pid: str, file: Path) -> None:
    """Signal the process that holds the lock.

    A holder writes its pid after it takes the lock. Until then the file has its predecessor's pid, which may be free or
    belong to another program by now. So only a process that has the file open gets the signal.
    """
    if not holder_pid.isdecimal():
        return
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(int(holder_pid))
        if any(opened.path == str(file.resolve()) for opened in process.open_files()):
            process.send_signal(SIGNAL)
