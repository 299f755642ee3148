"""A job's side of the key broker: the same protocol as every key store, over its Unix socket."""

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

# Not sent a second time when the answer is lost: it may have been done.
_ONCE = frozenset({Operation.rotate, Operation.revoke})


class BrokerKeyStore:
    """A KeyStore that asks the broker. Thread-safe; one connection, made on first use and again after a fork.

    Args:
        socket: the broker's socket.
        token: gives the caller's token; asked for every request, so it may return a renewed one.
        owner: the user that the broker runs as, where that is known. Without it root's jobs ask root's broker alone.
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
        self._ask(Operation.ensure, name=info.name, info=info.plain())

    def info(self, name: str) -> KeyInfo:
        """The description of a key."""
        return KeyInfo.from_plain(self._ask(Operation.info, name=check_name(name)))

    def wrap(self, name: str, secret: bytes) -> str:
        """Encrypt a secret under the newest version."""
        check_secret(check_name(name), secret)
        return self._text(Operation.wrap, name=name, secret=base64.b64encode(secret).decode())

    def unwrap(self, name: str, wrapped: str) -> bytes:
        """Decrypt a wrapped secret."""
        text = self._text(Operation.unwrap, name=check_name(name), wrapped=wrapped)
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise self._garbled() from None

    def rewrap(self, name: str, wrapped: str) -> str:
        """Wrap a secret anew under the newest version."""
        return self._text(Operation.rewrap, name=check_name(name), wrapped=wrapped)

    def rotate(self, name: str) -> int:
        """Add a version; gives its number."""
        version = self._ask(Operation.rotate, name=check_name(name))
        if not isinstance(version, int):
            raise self._garbled()
        return version

    def revoke(self, name: str) -> None:
        """Destroy every version."""
        self._ask(Operation.revoke, name=check_name(name))

    def names(self) -> list[str]:
        """The names of the living keys that the caller may know about, sorted."""
        names = self._ask(Operation.names)
        if not isinstance(names, list):
            raise self._garbled()
        return [str(name) for name in names]

    def close(self) -> None:
        """Close the connection; the next call makes another."""
        with self._lock:
            self._hang_up()

    def _text(self, operation: Operation, **fields: object) -> str:
        text = self._ask(operation, **fields)
        if not isinstance(text, str):
            raise self._garbled()
        return text

    def _ask(self, operation: Operation, **fields: object) -> object:
        request: dict[str, object] = {"op": operation.value, "token": self._token(), **fields}
        with self._lock:
            if self._pid != os.getpid():  # after a fork the connection is the parent's
                self._connection, self._pid = None, os.getpid()
            if operation in _ONCE:
                self._hang_up()
            answer = self._exchange(request)
        if answer.get("ok") is True:
            return answer.get("result")
        raise error_from_plain(answer)

    def _exchange(self, request: dict[str, object]) -> dict[str, object]:
        """Send and receive; once more over a new connection if the broker was started anew in between."""
        reused = self._connection is not None
        try:
            return self._once(request)
        except OSError as error:
            self._hang_up()
            if not reused or isinstance(error, TimeoutError):
                raise self._unavailable(error) from error
        try:
            return self._once(request)
        except OSError as error:
            self._hang_up()
            raise self._unavailable(error) from error

    def _once(self, request: dict[str, object]) -> dict[str, object]:
        connection = self._connection or self._connect()
        try:
            with contextlib.suppress(BrokenPipeError):  # turned away: the answer lies there already
                send(connection, request, timeout_s=self._timeout_s)
            answer = receive(connection, idle_s=self._timeout_s, read_s=self._timeout_s)
        except BaseException:  # a late answer must never be taken for the next request's
            self._hang_up()
            raise
        if answer is None:
            raise ConnectionResetError("The broker closed the connection.")
        return answer

    def _connect(self) -> Socket:
        connection = Socket(AF_UNIX, SOCK_STREAM)
        try:
            connection.settimeout(self._timeout_s)
            connection.connect(self._path)
            # A token goes to nobody else. Root's jobs may use the broker of the user that the cluster runs as.
            own = os.geteuid()
            trusted = {own, 0} if own != 0 or self._owner is None else {self._owner, 0}
            if (uid := peer_uid(connection)) not in trusted:
                raise KeyStoreUnavailable(
                    f"What listens at {self._path} belongs to user {uid}, which this cluster does not run as: no token "
                    "was sent. Ask whoever administers this machine; `python -m cluster.status` checks the folders."
                )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None

    def _unavailable(self, error: OSError) -> KeyStoreUnavailable:
        why = error.strerror or str(error) or type(error).__name__
        return KeyStoreUnavailable(
            f"No key broker answers at {self._path} ({why}). If the cluster is up, its supervisor starts the broker "
            "again within seconds: try once more. `python -m cluster.status` shows what is missing, and "
            "`python -m cluster.up` starts that."
        )

    def _garbled(self) -> KeyStoreUnavailable:
        return KeyStoreUnavailable(
            f"What answers at {self._path} is no key broker of this release. Run `python -m cluster.down`, then "
            "`python -m cluster.up`."
        )


def broker_answers(path: Path, *, timeout_s: float = 2.0) -> bool:
    """Whether a broker at a socket answers at all, whatever it says."""
    try:
        with Socket(AF_UNIX, SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            send(connection, PING, timeout_s=timeout_s)
            return receive(connection, idle_s=timeout_s, read_s=timeout_s) is not None
    except (OSError, InvalidRequest):
        return False
