"""Who may interrupt whom on a busy core: replicas may, and everything else that a cluster runs waits for its turn.

A process that wakes up interrupts the one that runs on its core, under Linux's normal policy, if it has had less of the
core lately; and HAProxy, Ray's daemons and their controllers wake up thousands of times a second. Each interruption
costs a replica its caches and holds up all requests that wait in it. Under SCHED_BATCH a process that wakes up waits
until the running one's slice is over, a few milliseconds at most, and on a core that is free it waits for nothing.

No privilege is needed for either, and a process that is started has its parent's policy. Where a sandbox forbids it, or
there is no Linux, all interrupt each other as they always did.
"""

from __future__ import annotations

import contextlib
import os


def wait_for_turn() -> None:
    """Have this thread, and what is started from it, interrupt nobody."""
    _set("SCHED_BATCH")


def interrupt_others() -> None:
    """Have this thread interrupt what waits for its turn, as a process normally does."""
    _set("SCHED_OTHER")


def _set(policy: str) -> None:
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
