"""The number of replicas that a rollout has requested for a replica's version, read in a thread.

A call to the database can hang, and a replica must go on answering. While the ledger does not answer, the last number
stays until its time is over.
"""

from __future__ import annotations

import logging
import threading

import sqlalchemy as sa

from cluster.errors import FalajError
from cluster.ledger import Ledger
from cluster.ledger.store import utc_now
from serve_apps.rollout.capacity.requested import RequestedReplicas

INTERVAL_S = 2.0
LOG = logging.getLogger("falaj.serve")


class RequestedNumber:
    """The number for one version.

    Args:
        ledger: The ledger.
        model, version: What this replica serves.
    """

    def __init__(self, ledger: Ledger, model: str, version: int) -> None:
        self._requested = RequestedReplicas(ledger)
        self._model = model
        self._version = version
        self._closed = threading.Event()
        threading.Thread(target=self._follow, daemon=True, name="requested replicas").start()

    @property
    def value(self) -> int:
        """The requested number of replicas; 0 if none is requested."""
        request = self._requested.find(self._model, self._version, now=utc_now())
        return 0 if request is None else request.replicas

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                self._requested.update()
            except (sa.exc.SQLAlchemyError, FalajError) as error:
                LOG.warning(
                    "the ledger does not say how many replicas are requested: %s", type(error).__name__
                )
            self._closed.wait(INTERVAL_S)
