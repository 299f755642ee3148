"""The shadow's replicas as a replica beside them sees them: when Serve is asked for them, and connections to them."""

from __future__ import annotations

import http.client
import os
import select
import time
from collections.abc import Callable, Collection, Mapping

from cluster.own_server import require_own_peer

INTERVAL_S, FIRST_S = 10.0, 1.0
TIMEOUT_S = 5.0


class Pace:
    """When to ask Serve: every replica does, and one dashboard answers all of them.

    So now and then, and sooner only where copies do not arrive: ever less so, the longer that goes on.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: float | None = None
        self._patience_s = FIRST_S

    def is_due(self, *, failing: bool) -> bool:
        """Whether to ask now; it counts as asked then."""
        now = self._clock()
        wait_s = self._patience_s if failing else INTERVAL_S
        if self._asked is not None and now < self._asked + wait_s:
            return False
        self._asked = now
        self._patience_s = min(2 * self._patience_s, INTERVAL_S) if failing else FIRST_S
        return True


class Connections:
    """One to each replica, kept for the next copy; they are one thread's."""

    def __init__(self) -> None:
        self._open: dict[str, http.client.HTTPConnection] = {}

    def keep(self, addresses: Collection[str]) -> None:
        """Close those to all others: replicas that are gone."""
        for address in self._open.keys() - set(addresses):
            self._open.pop(address).close()

    def close(self) -> None:
        """Close all."""
        self.keep(())

    def post(self, address: str, path: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a request, once; gives the answer's status.

        A replica closes a connection that was idle for 90 s. That is seen before anything is sent: to send again what
        got no answer could have the shadow log one request twice, and count it twice in every comparison.

        Raises:
            OSError, http.client.HTTPException: it did not arrive, or was not answered.
        """
        connection = self._open.pop(address, None)
        if connection is None or _is_closed(connection):
            if connection is not None:
                connection.close()
            connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        try:
            if connection.sock is None:
                _connect(connection)
            connection.request("POST", path, body, dict(headers))
            response = connection.getresponse()
            response.read()
        except BaseException:
            connection.close()
            raise
        self._open[address] = connection
        return response.status


def _connect(connection: http.client.HTTPConnection) -> None:
    """Connect to a replica, which is a process of this one's user: a token goes along."""
    connection.connect()
    require_own_peer(connection.sock, owner=os.geteuid())


def _is_closed(connection: http.client.HTTPConnection) -> bool:
    """Whether there is something to read although nothing was asked, which is the other side's end."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
