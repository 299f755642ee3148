"""A signal sets an event wherever the main thread is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from cluster.host.signals import set_on_signal


@pytest.fixture(autouse=True)
def own_handler() -> Iterator[None]:
    """Restore the handler of SIGUSR1."""
    previous = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, previous)


def test_signal_does_not_wait_for_a_lock_that_the_main_thread_holds() -> None:
    """The main thread holds a lock in `Event.wait`, for example. `Event.set` in the handler would then wait forever."""
    first, second = threading.Event(), threading.Event()
    set_on_signal([signal.SIGUSR1], first, second)
    with first._cond:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert first.wait(5)
    assert second.wait(5)
