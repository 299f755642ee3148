"""Requests from a node to the head's service for nodes."""

from __future__ import annotations

import queue
import ssl
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.membership.transport import connect, node_context, split_address
from cluster.security.keys.store import KeyStoreUnavailable
from cluster.security.keys.wire import error_from_plain, receive, send
from cluster.session import ClusterRecord

ANSWER_S = 10.0
MAX_IDLE = 16
"""Most connections that are kept open."""


class HeadClient:
    """Sends requests to the head, with this node's certificate. Thread-safe.

    Args:
        head: `host:port` of the head's service for nodes.
        tls: folder with this node's certificates.
        address: this node's address.
    """

    def __init__(self, head: str, *, tls: Path, address: str) -> None:
        split_address(head)
        self._head = head
        self._tls = tls
        self._address = address
        self._idle: queue.LifoQueue[ssl.SSLSocket] = queue.LifoQueue(MAX_IDLE)

    @classmethod
    def of(cls, record: ClusterRecord) -> HeadClient:
        """Return the client for a node's record, also for the head's own."""
        head = record.head or f"{record.address}:{record.ports['nodes']}"
        return cls(head, tls=Path(record.layout.tls), address=record.address)

    def request(self, operation: str, **fields: object) -> object:
        """Send a request, and return the result.

        Raises:
            KeyStoreUnavailable: the head does not answer.
            FalajError: the head's error.
        """
        answer = self.exchange({"op": operation, **fields})
        if answer.get("ok") is True:
            return answer.get("result")
        raise error_from_plain(answer)

    def exchange(self, message: dict[str, object], *, repeatable: bool = True) -> dict[str, object]:
        """Send a message, and return the answer, which may be an error.

        Args:
            message: the request.
            repeatable: whether it may be sent again over a new connection if an old one was closed.

        Raises:
            KeyStoreUnavailable: the head does not answer.
        """
        try:
            if repeatable:
                try:
                    return self._send(self._idle.get_nowait(), message)
                except (queue.Empty, ConnectionError, ssl.SSLError):
                    pass
            return self._send(self.open(), message)
        except OSError as error:
            raise self._unavailable(error) from error

    def open(self) -> ssl.SSLSocket:
        """Open a connection. The caller closes it.

        Raises:
            ConfigError: a certificate is not valid.
            OSError: the head does not answer.
        """
        return connect(self._head, node_context(self._tls), own_address=self._address)

    def _send(self, connection: ssl.SSLSocket, message: dict[str, object]) -> dict[str, object]:
        try:
            send(connection, message, timeout_s=ANSWER_S)
            answer = receive(connection, idle_s=ANSWER_S, read_s=ANSWER_S)
            if answer is None:
                raise ConnectionResetError("the head closed the connection")
        except BaseException:  # a late answer must never be read as the next request's
            connection.close()
            raise
        try:
            self._idle.put_nowait(connection)
        except queue.Full:
            connection.close()
        return answer

    def _unavailable(self, error: OSError) -> KeyStoreUnavailable:
        reason = error.strerror or str(error) or type(error).__name__
        return KeyStoreUnavailable(
            f"The head's service for nodes at {self._head} does not answer ({reason}). `python -m cluster.status` on "
            "the head shows what is missing."
        )


def first_request(
    head: str, context: ssl.SSLContext, message: dict[str, object], *, own_address: str
) -> dict[str, Any]:
    """Send the first request of a new node, and return its result.

    Raises:
        ConfigError: nothing answers at the address, or its certificate is not the head's.
        FalajError: the head's refusal.
    """
    try:
        with connect(head, context, own_address=own_address) as connection:
            send(connection, message, timeout_s=ANSWER_S)
            answer = receive(connection, idle_s=6 * ANSWER_S, read_s=ANSWER_S)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"No head answers at {head} ({reason}). Check head=…, the network, and that the head runs with a "
            "cluster.address that this machine reaches."
        ) from None
    if answer is None:
        raise ConfigError(f"What listens at {head} closed the connection. Check head=….")
    if answer.get("ok") is True and isinstance(result := answer.get("result"), dict):
        return result
    raise error_from_plain(answer)
