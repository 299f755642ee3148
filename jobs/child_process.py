"""Run a command as a child process: of a schedule, or of a submitted job."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster import entrypoint
from cluster.host.signals import set_on_signal
from jobs.command_states import DONE, FAILED, REFUSED

STOP_S = 10.0
"""Seconds that a child has to end by itself."""
ERROR_CHARACTERS = 500
"""Longest stored line of a child's errors."""
MAX_REFUSALS = 5
"""A command can give several reasons of a refusal. At most this many are stored."""
_REFUSAL = "refused: "
_STOPPED = "the job was stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a child ended."""

    exit_code: int
    state: str
    """`DONE`, `REFUSED` or `FAILED`."""
    seconds: float
    reason: str
    """Why it was ended, its reasons of a refusal, or the last line of its errors; "" after a success."""
    was_stopped: bool
    """Whether it was ended because this process was stopped."""


def execute(
    command: Sequence[str], *, folder: str, variables: Mapping[str, str], timeout_s: float | None = None
) -> Ended:
    """Run a command, and return how it ended. If this process gets SIGTERM or SIGINT, the child is ended.

    Args:
        command: Program and arguments.
        folder: Folder to run in.
        variables: Added to the environment of this process.
        timeout_s: Seconds after which the child is ended.
    """
    begun, stopped = time.monotonic(), threading.Event()
    set_on_signal([signal.SIGTERM, signal.SIGINT], stopped)
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    errors = ErrorOutput(child)
    code, reason = wait(child, stopped, deadline=None if timeout_s is None else begun + timeout_s)
    errors.join()
    state = {0: DONE, entrypoint.REFUSED: REFUSED}.get(code, FAILED)
    return Ended(
        exit_code=code,
        state=FAILED if reason else state,
        seconds=round(time.monotonic() - begun, 3),
        reason=reason or errors.reason(state),
        was_stopped=reason == _STOPPED,
    )


class ErrorOutput(threading.Thread):
    """Thread that copies a child's standard error to this process's, and stores the last line and the refusals."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._child = child
        self.last_line = ""
        self.refusals: list[str] = []
        self.start()

    def reason(self, state: str) -> str:
        """Return why the child ended in a state; "" after a success."""
        if state == REFUSED and self.refusals:
            return " ".join(dict.fromkeys(self.refusals))
        return "" if state == DONE else self.last_line

    def run(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            text = line.strip()[:ERROR_CHARACTERS]
            self.last_line = text or self.last_line
            if text.startswith(_REFUSAL) and len(self.refusals) < MAX_REFUSALS:
                self.refusals.append(text.removeprefix(_REFUSAL))


def wait(
    child: subprocess.Popen[str], stopped: threading.Event, *, deadline: float | None
) -> tuple[int, str]:
    """Wait for a child. End it if this process is stopped, or at the deadline.

    Returns:
        The exit code, and why the child was ended, or "".
    """
    reason = ""
    while child.poll() is None:
        if stopped.wait(0.2):
            reason = _STOPPED
        elif deadline is not None and time.monotonic() > deadline:
            reason = "it ran longer than timeout_s"
        if reason:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
            child.kill()
    return child.wait(), reason
