"""Poll a slow source in a thread, so that a rollback does not wait for the source."""

from __future__ import annotations

import concurrent.futures
import http.client
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.errors import FalajError

LOG = logging.getLogger("falaj.edge")
T = TypeVar("T")


class PolledSource(Generic[T]):
    """The newest value of a source.

    Args:
        fetch: reads the source. If it raises an error, the error is logged and the last value stays.
        name: name of the source in the log.
        value: value before the first answer.
        interval_s: seconds from one answer to the next fetch.
    """

    def __init__(self, fetch: Callable[[], T], *, name: str, value: T, interval_s: float) -> None:
        self.value = value
        self.answered_at = 0.0
        """Unix seconds of the last answer; 0 before the first."""
        self._fetch = fetch
        self._name = name
        self._interval_s = interval_s
        self._executor = concurrent.futures.ThreadPoolExecutor(1, name)
        self._pending: concurrent.futures.Future[T] | None = None
        self._next_at = 0.0

    def poll(self, *, wait_s: float = 0.0) -> None:
        """If an answer has arrived, use it as the new value. Start the next fetch if it is due.

        Args:
            wait_s: how many seconds to wait for the answer.
        """
        if self._pending is None:
            if time.monotonic() < self._next_at:
                return
            self._pending = self._executor.submit(self._fetch)
        if wait_s:
            concurrent.futures.wait([self._pending], timeout=wait_s)
        if not self._pending.done():
            return
        answer, self._pending = self._pending, None
        self._next_at = time.monotonic() + self._interval_s
        try:
            self.value = answer.result()
            self.answered_at = time.time()
        except (OSError, ValueError, KeyError, TypeError, FalajError, http.client.HTTPException) as error:
            LOG.warning("%s cannot be read, so its last value stays: %s", self._name, error)

    def stop(self) -> None:
        """Start no more fetches."""
        self._executor.shutdown(wait=False, cancel_futures=True)
