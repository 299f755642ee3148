"""CPU scheduling policies: replicas can preempt other processes, but the cluster's other processes cannot.

Under Linux's normal policy, a process that wakes up preempts a running process that has used the core more. HAProxy,
Ray's daemons and their controllers wake up thousands of times a second. Each preemption costs a replica its CPU caches
and delays all its waiting requests. Under SCHED_BATCH, a process that wakes up waits until the running process's time
slice ends, a few milliseconds at most. On a free core it does not wait.

Neither policy needs a privilege. A new process inherits its parent's policy. If a sandbox forbids the call, or the
system is not Linux, the policy stays normal and all processes preempt each other.
"""

from __future__ import annotations

import contextlib
import os


def wait_for_turn() -> None:
    """Set SCHED_BATCH for this thread and the processes that it starts, so that they preempt no other process."""
    _set("SCHED_BATCH")


def interrupt_others() -> None:
    """Set the normal policy, SCHED_OTHER, for this thread, so that it can preempt SCHED_BATCH processes."""
    _set("SCHED_OTHER")


def _set(policy: str) -> None:
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
