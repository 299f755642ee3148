"""Keys that a replica fetches before it needs them.

While the head is down, a node gets no keys, so a replica without the keys of a view cannot accept a push to it. So each
replica fetches the keys of all views with a push log when it starts, and again once a minute.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import AccessDenied, FalajError

EVERY_S = 60.0
LOG = logging.getLogger("falaj.features")


class HeldKeys:
    """Fetches keys in a thread of its own.

    Args:
        hold: fetches the keys of one view.
        views: returns the names of the views.
        every_s: seconds between two rounds.
    """

    def __init__(
        self, hold: Callable[[str], None], *, views: Callable[[], Iterable[str]], every_s: float = EVERY_S
    ) -> None:
        self._hold, self._views, self._every_s = hold, views, every_s
        self._failed: set[str] = set()
        self._refused: set[str] = set()
        """Views whose keys this replica may not use. Each further request would be a denial in the ledger."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="held-keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current round."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._hold_all()
            if self._stopped.wait(self._every_s):
                return

    def _hold_all(self) -> None:
        """Fetch the keys of all views, and log the first failure of each view."""
        try:
            for view in self._views():
                self._hold_one(view)
        except SQLAlchemyError as error:
            LOG.warning("the views with a push log cannot be listed: %s", type(error).__name__)

    def _hold_one(self, view: str) -> None:
        try:
            if view not in self._refused:
                self._hold(view)
            self._failed.discard(view)
        except AccessDenied as error:
            LOG.warning("this replica may not use the keys of view '%s': %s", view, error)
            self._refused.add(view)
        except (FalajError, SQLAlchemyError) as error:
            if view not in self._failed:
                LOG.warning("the keys of view '%s' cannot be fetched: %s", view, error)
            self._failed.add(view)
