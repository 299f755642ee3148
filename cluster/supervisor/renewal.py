"""Renews a machine's certificates while its processes run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from cluster.errors import FalajError, first_line

EVERY_S = 60.0
LOG_EVERY_S = 3600.0
LOG = logging.getLogger("falaj.supervisor")


class Renewal(threading.Thread):
    """Checks once a minute whether a certificate is due, so it is renewed soon after two thirds of its lifetime.

    After a failure it tries again a minute later. It logs failures once an hour, because a third of the lifetime is
    left.

    Args:
        renew: renews the certificates that are due, and returns whether there are new ones.
        stopped: ends the thread.
        every_s: seconds between two tries.
    """

    def __init__(
        self, renew: Callable[[], bool], *, stopped: threading.Event, every_s: float = EVERY_S
    ) -> None:
        super().__init__(name="certificates", daemon=True)
        self._renew = renew
        self._stopped = stopped
        self._every_s = every_s
        self._logged_at = -LOG_EVERY_S

    def run(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                if self._renew():
                    LOG.warning("the certificates of this machine were renewed")
            except (FalajError, OSError, ValueError, sa.exc.SQLAlchemyError) as error:
                if time.monotonic() >= self._logged_at + LOG_EVERY_S:
                    self._logged_at = time.monotonic()
                    LOG.error("the certificates of this machine could not be renewed: %s", first_line(error))
