"""Who waits for the end of a slice on a busy core, and who interrupts."""

from __future__ import annotations

import os
import threading

import pytest

from cluster.node.scheduling import interrupt_others, wait_for_turn


def in_a_thread() -> list[int]:
    """The policy of a thread before, while it waits for its turn, and when it interrupts again."""
    found = [os.sched_getscheduler(0)]

    def change() -> None:
        wait_for_turn()
        found.append(os.sched_getscheduler(0))
        interrupt_others()
        found.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    return found


def test_a_thread_waits_for_its_turn_and_interrupts_again() -> None:
    """Without any privilege, and without a word to other threads."""
    before, waiting, interrupting = in_a_thread()
    assert (waiting, interrupting) == (os.SCHED_BATCH, os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == before


def test_where_it_is_forbidden_everything_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox may take the call away."""

    tried = []

    def forbid(_: int, policy: int, *__: object) -> None:
        tried.append(policy)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    wait_for_turn()
    interrupt_others()
    assert tried == [os.SCHED_BATCH, os.SCHED_OTHER]
