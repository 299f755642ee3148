"""A source that may be slow, asked in a thread again and again: nobody waits for it, least of all a rollback."""

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


class Followed(Generic[T]):
    """The newest that a source has said.

    Args:
        fetch: asks the source; what it raises is logged, and the last value stays.
        name: of the source, in the log.
        value: until it has answered.
        interval_s: from one answer to the next question.
    """

    def __init__(self, fetch: Callable[[], T], *, name: str, value: T, interval_s: float) -> None:
        self.value = value
        self.answered_at = 0.0
        self._fetch = fetch
        self._name = name
        self._interval_s = interval_s
        self._asker = concurrent.futures.ThreadPoolExecutor(1, name)
        self._asked: concurrent.futures.Future[T] | None = None
        self._next_at = 0.0

    def look(self, *, wait_s: float = 0.0) -> None:
        """Take an answer that has come, and ask when it is time.

        Args:
            wait_s: how long to wait for the answer.
        """
        if self._asked is None:
            if time.monotonic() < self._next_at:
                return
            self._asked = self._asker.submit(self._fetch)
        if wait_s:
            concurrent.futures.wait([self._asked], timeout=wait_s)
        if not self._asked.done():
            return
        answer, self._asked = self._asked, None
        self._next_at = time.monotonic() + self._interval_s
        try:
            self.value = answer.result()
            self.answered_at = time.time()
        except (OSError, ValueError, KeyError, TypeError, FalajError, http.client.HTTPException) as error:
            LOG.warning("%s cannot be asked, the last answer stays: %s", self._name, error)

    def stop(self) -> None:
        """Ask no more."""
        self._asker.shutdown(wait=False, cancel_futures=True)
