"""Setting an event when a signal arrives.

A signal handler runs in the main thread, between any two of its instructions. If that thread is inside `Event.wait`, it
may hold the event's lock, and `Event.set` in the handler would then wait for it forever. So another thread sets it.
"""

from __future__ import annotations

import _thread
import signal
import threading
from types import FrameType


def set_on_signal(
    event: threading.Event, *numbers: signal.Signals, then: threading.Event | None = None
) -> None:
    """Set an event whenever one of the signals arrives, and then another one, if given."""

    def set_events() -> None:
        event.set()
        if then is not None:
            then.set()

    def handle(_number: int, _frame: FrameType | None) -> None:
        _thread.start_new_thread(set_events, ())

    for number in numbers:
        signal.signal(number, handle)
