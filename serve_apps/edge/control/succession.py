"""Each edge has only one controller. A new controller asks the old one to hand over, so a second start is a restart."""

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
    """Wait for the previous controller to release the lock file, then hold the lock during the `with` block.

    Raises:
        ConfigError: the previous controller did not release the lock within 20 s.
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

    A process writes its pid into the file after it has taken the lock. Until then, the file has the pid of the previous
    process. That pid may be free or belong to another program by now. So the signal is only sent if the process with
    this pid has the file open.
    """
    if not holder_pid.isdecimal():
        return
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(int(holder_pid))
        if any(opened.path == str(file.resolve()) for opened in process.open_files()):
            process.send_signal(SIGNAL)
