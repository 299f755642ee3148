"""Tests of CPU scheduling policies."""

from __future__ import annotations

import os
import threading

import pytest

from cluster.node.scheduling import interrupt_others, wait_for_turn


def policies_in_a_thread() -> list[int]:
    """Return a thread's policy at the start, after `wait_for_turn`, and after `interrupt_others`."""
    policies = [os.sched_getscheduler(0)]

    def change() -> None:
        wait_for_turn()
        policies.append(os.sched_getscheduler(0))
        interrupt_others()
        policies.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    return policies


def test_policy_changes_for_one_thread_only() -> None:
    """It needs no privilege."""
    before, waiting, interrupting = policies_in_a_thread()
    assert (waiting, interrupting) == (os.SCHED_BATCH, os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == before


def test_forbidden_call_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox can forbid the call."""

    tried = []

    def forbid(_: int, policy: int, *__: object) -> None:
        tried.append(policy)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    wait_for_turn()
    interrupt_others()
    assert tried == [os.SCHED_BATCH, os.SCHED_OTHER]
