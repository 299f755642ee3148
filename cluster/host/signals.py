"""Sets events when a signal arrives.

A signal handler runs in the main thread, between any two instructions of that thread. If the thread is inside
`Event.wait`, it may hold the event's lock. `Event.set` in the handler would then wait for the lock forever. So another
thread sets the event.
"""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Collection
from types import FrameType


def set_on_signal(numbers: Collection[signal.Signals], *events: threading.Event) -> None:
    """Set the events, in their order, whenever one of the signals arrives."""

    def set_events() -> None:
        for event in events:
            event.set()

    def handle(_number: int, _frame: FrameType | None) -> None:
        _thread.start_new_thread(set_events, ())

    for number in numbers:
        signal.signal(number, handle)
