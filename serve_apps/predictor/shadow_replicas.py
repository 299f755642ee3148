"""Connections from a replica to the shadow's replicas, and the schedule for fetching their addresses from Serve."""

from __future__ import annotations

import http.client
import os
import select
import ssl
import time
from collections.abc import Callable, Collection, Mapping

from cluster.host.port_owner import require_own_peer
from serve_apps.replica.targets import uses_tls

INTERVAL_S, FIRST_RETRY_S = 10.0, 1.0
TIMEOUT_S = 5.0


class FetchSchedule:
    """Decides when to fetch the addresses. Fetches are rare, because one dashboard answers the fetches of all replicas.

    While copies fail, fetches are more frequent. The wait doubles after each fetch, up to the normal interval.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_at: float | None = None
        self._retry_s = FIRST_RETRY_S

    def is_due(self, *, failing: bool) -> bool:
        """Return whether to fetch now. If the result is True, the caller must fetch."""
        now = self._clock()
        wait_s = self._retry_s if failing else INTERVAL_S
        if self._last_at is not None and now < self._last_at + wait_s:
            return False
        self._last_at = now
        self._retry_s = min(2 * self._retry_s, INTERVAL_S) if failing else FIRST_RETRY_S
        return True


class Connections:
    """The open connections of one thread, one connection for each replica.

    Args:
        authority: file with the certificate of the nodes' authority, for replicas that are not on loopback.
    """

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._open: dict[str, http.client.HTTPConnection] = {}

    def close_others(self, addresses: Collection[str]) -> None:
        """Close the connections to all other addresses, because their replicas do not exist any more."""
        for address in self._open.keys() - set(addresses):
            self._open.pop(address).close()

    def close(self) -> None:
        """Close all connections."""
        self.close_others(())

    def post(self, address: str, path: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Send a request once, and return the answer's status.

        A replica closes a connection that was idle for 90 s. This is detected before anything is sent. A request
        without an answer is not sent again, because the shadow might then log it twice, and comparisons would count it
        twice.

        Raises:
            OSError, http.client.HTTPException: the request did not arrive, or got no answer.
        """
        connection = self._open.pop(address, None)
        if connection is None or _is_closed(connection):
            if connection is not None:
                connection.close()
            connection = self._new(address)
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

    def _new(self, address: str) -> http.client.HTTPConnection:
        if not uses_tls(address):
            return http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        context = ssl.create_default_context(cafile=self._authority)
        return http.client.HTTPSConnection(address, timeout=TIMEOUT_S, context=context)


def _connect(connection: http.client.HTTPConnection) -> None:
    """Connect to a replica. Require that its process belongs to this user, because the request contains a token.

    A replica on another address proves by its certificate that it is a node's.
    """
    connection.connect()
    require_own_peer(connection.sock, owner=os.geteuid())


def _is_closed(connection: http.client.HTTPConnection) -> bool:
    """Return whether the other side has closed the connection: it is readable although no request is open."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
