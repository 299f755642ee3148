"""Client of the key broker. It implements the `KeyStore` protocol over a Unix socket."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM
from socket import socket as Socket

from cluster.errors import InvalidRequest
from cluster.security.keys.gate import Operation
from cluster.security.keys.store import KeyInfo, KeyStoreUnavailable, check_name, check_secret
from cluster.security.keys.wire import PING, check_socket_path, error_from_plain, peer_uid, receive, send

# If the answer is lost, these are never sent again, because the broker may already have executed them.
_NOT_REPEATABLE = frozenset({Operation.rotate, Operation.revoke})


class BrokerKeyStore:
    """KeyStore that sends its requests to the broker. It is thread-safe.

    It uses one connection, which is opened for the first request, and opened again after a fork.

    Args:
        socket: the broker's socket.
        token: returns the caller's token. It is called for every request, so it may return a renewed token.
        owner: id of the user that runs the broker, if known. If not, root's jobs accept only a broker of root.
        timeout_s: seconds to wait for an answer.
    """

    def __init__(
        self, socket: Path, token: Callable[[], str], *, owner: int | None = None, timeout_s: float = 10.0
    ) -> None:
        self._owner = owner
        self._path = check_socket_path(str(socket))
        self._token = token
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connection: Socket | None = None
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"BrokerKeyStore({self._path!r})"

    def ensure(self, info: KeyInfo) -> None:
        """Create a key, or update its description."""
        self._request(Operation.ensure, name=info.name, info=info.plain())

    def info(self, name: str) -> KeyInfo:
        """Return the description of a key."""
        return KeyInfo.from_plain(self._request(Operation.info, name=check_name(name)))

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt a secret with the newest version of the key."""
        check_secret(check_name(name), secret)
        return self._request_text(Operation.wrap, name=name, secret=base64.b64encode(secret).decode())

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt a wrapped secret."""
        text = self._request_text(Operation.unwrap, name=check_name(name), wrapped=wrapped)
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise self._invalid_answer() from None

    def rewrap(self, name: str, wrapped: str) -> str:
        """Wrap a secret again, with the newest version of the key."""
        return self._request_text(Operation.rewrap, name=check_name(name), wrapped=wrapped)

    def rotate(self, name: str) -> int:
        """Add a version and return its number."""
        version = self._request(Operation.rotate, name=check_name(name))
        if not isinstance(version, int):
            raise self._invalid_answer()
        return version

    def revoke(self, name: str) -> None:
        """Destroy every version."""
        self._request(Operation.revoke, name=check_name(name))

    def names(self) -> list[str]:
        """Return the names of the keys that the caller may see, sorted, without revoked keys."""
        names = self._request(Operation.names)
        if not isinstance(names, list):
            raise self._invalid_answer()
        return [str(name) for name in names]

    def close(self) -> None:
        """Close the connection. The next call opens a new one."""
        with self._lock:
            self._disconnect()

    def _request_text(self, operation: Operation, **fields: object) -> str:
        text = self._request(operation, **fields)
        if not isinstance(text, str):
            raise self._invalid_answer()
        return text

    def _request(self, operation: Operation, **fields: object) -> object:
        request: dict[str, object] = {"op": operation.value, "token": self._token(), **fields}
        with self._lock:
            if self._pid != os.getpid():  # after a fork, the connection belongs to the parent
                self._connection, self._pid = None, os.getpid()
            if operation in _NOT_REPEATABLE:
                self._disconnect()
            answer = self._exchange(request)
        if answer.get("ok") is True:
            return answer.get("result")
        raise error_from_plain(answer)

    def _exchange(self, request: dict[str, object]) -> dict[str, object]:
        """Send a request and return the answer.

        It retries once over a new connection, in case the broker was restarted.
        """
        reused = self._connection is not None
        try:
            return self._send_once(request)
        except OSError as error:
            self._disconnect()
            if not reused or isinstance(error, TimeoutError):
                raise self._unavailable(error) from error
        try:
            return self._send_once(request)
        except OSError as error:
            self._disconnect()
            raise self._unavailable(error) from error

    def _send_once(self, request: dict[str, object]) -> dict[str, object]:
        connection = self._connection or self._connect()
        try:
            with contextlib.suppress(BrokenPipeError):  # the broker refused, and its answer is already there
                send(connection, request, timeout_s=self._timeout_s)
            answer = receive(connection, idle_s=self._timeout_s, read_s=self._timeout_s)
        except BaseException:  # a late answer must never be read as the answer to the next request
            self._disconnect()
            raise
        if answer is None:
            raise ConnectionResetError("The broker closed the connection.")
        return answer

    def _connect(self) -> Socket:
        connection = Socket(AF_UNIX, SOCK_STREAM)
        try:
            connection.settimeout(self._timeout_s)
            connection.connect(self._path)
            # Send tokens to these users only. Root's jobs may use the broker of the user that runs the cluster.
            own_uid = os.geteuid()
            trusted = {own_uid, 0} if own_uid != 0 or self._owner is None else {self._owner, 0}
            if (uid := peer_uid(connection)) not in trusted:
                raise KeyStoreUnavailable(
                    f"The process that listens at {self._path} belongs to user {uid}, which does not run this cluster, "
                    "so no token was sent. Ask the administrator; `python -m cluster.status` checks the folders."
                )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None

    def _unavailable(self, error: OSError) -> KeyStoreUnavailable:
        why = error.strerror or str(error) or type(error).__name__
        return KeyStoreUnavailable(
            f"No key broker answers at {self._path} ({why}). If the cluster is up, its supervisor restarts the broker "
            "within seconds: try again. `python -m cluster.status` shows what is missing, and "
            "`python -m cluster.up` starts it."
        )

    def _invalid_answer(self) -> KeyStoreUnavailable:
        return KeyStoreUnavailable(
            f"The process that answers at {self._path} is not a key broker of this release. Run "
            "`python -m cluster.down`, then `python -m cluster.up`."
        )


def ask_broker(path: Path, request: dict[str, object], *, timeout_s: float = 10.0) -> object:
    """Send one request to the broker of a node that joined, and return the result.

    Raises:
        KeyStoreUnavailable: the broker does not answer.
        FalajError: the broker's error.
    """
    try:
        with Socket(AF_UNIX, SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            if (uid := peer_uid(connection)) not in (os.geteuid(), 0):
                raise KeyStoreUnavailable(f"The process that listens at {path} belongs to user {uid}.")
            send(connection, request, timeout_s=timeout_s)
            answer = receive(connection, idle_s=timeout_s, read_s=timeout_s)
    except OSError as error:
        raise KeyStoreUnavailable(f"No key broker answers at {path} ({error.strerror or error}).") from error
    if answer is None:
        raise KeyStoreUnavailable(f"The key broker at {path} closed the connection.")
    if answer.get("ok") is True:
        return answer.get("result")
    raise error_from_plain(answer)


def is_broker_alive(path: Path, *, timeout_s: float = 2.0) -> bool:
    """Return whether a broker at a socket gives any answer."""
    try:
        with Socket(AF_UNIX, SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            send(connection, PING, timeout_s=timeout_s)
            return receive(connection, idle_s=timeout_s, read_s=timeout_s) is not None
    except (OSError, InvalidRequest):
        return False
