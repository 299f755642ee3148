"""What a request costs: its time, and the CPU time of its work.

A replica answers in one event loop, so while a request's own code runs, no other request's code does. The CPU time of
the process in such a span is therefore that of the request, with all threads of the model. Time in which the request
waits, for example for its batch, is not added: other requests use the CPU then.
"""

from __future__ import annotations

import time


class RequestCost:
    """Adds up the cost of one request, from its creation on.

    `with cost:` adds the CPU time of the block, which must not wait for other work.
    """

    __slots__ = ("_began", "_cpu_s", "_started")

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._began = self._cpu_s = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.add_cpu(time.process_time() - self._began)

    def add_cpu(self, seconds: float) -> None:
        """Add CPU time that was measured elsewhere, such as the request's part of a batch."""
        self._cpu_s += seconds

    @property
    def took_ms(self) -> float:
        """Time since the creation, in milliseconds."""
        return round((time.perf_counter() - self._started) * 1000, 3)

    @property
    def cpu_ms(self) -> float:
        """CPU time so far, in milliseconds."""
        return round(self._cpu_s * 1000, 3)
