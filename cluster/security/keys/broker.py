"""Serves the key store on a Unix socket, so that no job needs to open the key store.

A job gets only the secrets that the policy grants to its token, and never the key-encryption key. Every denial is
recorded. But processes of one user can read each other's files and memory. So a hostile job that runs as the broker's
user can bypass the broker. It cannot do so if only another user can read the broker's files.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, SHUT_RD, SOCK_STREAM
from socket import socket as Socket
from typing import Protocol

from prometheus_client import CollectorRegistry

from cluster.errors import ConfigError, InvalidRequest
from cluster.security.keys.metrics import BrokerMetrics
from cluster.security.keys.store import KeyStoreUnavailable
from cluster.security.keys.wire import PING, check_socket_path, error_to_plain, peer_uid, receive, send
from cluster.security.private_folder import ensure_private_folder

MAX_CONNECTIONS = 256
IDLE_S = 600.0
READ_S = 5.0
STOP_S = 5.0
_POLL_S = 0.2


class Answering(Protocol):
    """What answers the requests: the gate of a key store, or the way to another broker."""

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """Return the answer to a request with any content; never raises."""

    def refuse_connection(self, reason: str) -> dict[str, object]:
        """Return the answer to a connection that is refused."""


class Broker:
    """Serves a key store over a Unix socket (0600, in a 0700 folder) to processes of the same user and of root.

    Args:
        gate: answers the requests.
        socket: path of the socket; at most 97 bytes.
        metrics: counts requests; not exported by default.
        idle_s: seconds after which a silent connection is closed. Clients reconnect automatically.
        read_s: seconds within which a message must arrive after its first byte.

    Raises:
        ConfigError: the socket's path is too long.
    """

    def __init__(
        self,
        gate: Answering,
        socket: Path,
        *,
        metrics: BrokerMetrics | None = None,
        idle_s: float = IDLE_S,
        read_s: float = READ_S,
    ) -> None:
        check_socket_path(str(socket))
        self._path = socket
        self._gate = gate
        self._metrics = metrics or BrokerMetrics(CollectorRegistry())
        self._idle_s = idle_s
        self._read_s = read_s
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: dict[Socket, threading.Thread] = {}
        self._lock = threading.Lock()

    def run(self, stopped: threading.Event) -> None:
        """Serve until `stopped` is set. Running requests are answered before it returns.

        Raises:
            ConfigError: another broker listens at the path, or the folder or path is unsafe.
        """
        with _listening(self._path) as listener:
            while not stopped.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # no file descriptors left, or the caller disconnected at once
                    logging.getLogger(__name__).warning("A connection was not accepted: %s.", error.strerror)
                    stopped.wait(_POLL_S)
                    continue
                self._admit(connection)
        self._drain()

    def _admit(self, connection: Socket) -> None:
        """Start a thread for a connection, or refuse the connection."""
        refusal = None
        uid = peer_uid(connection)
        if not peer_allowed(uid, own=os.geteuid()):
            refusal = self._gate.refuse_connection(f"it comes from user {uid}")
        elif not self._slots.acquire(blocking=False):
            refusal = error_to_plain(
                KeyStoreUnavailable(
                    f"The key broker serves {MAX_CONNECTIONS} connections at a time. Try again later."
                )
            )
        if refusal is not None:
            self._metrics.refused_connections.inc()
            with connection, contextlib.suppress(OSError):
                send(connection, refusal, timeout_s=_POLL_S)
            return
        thread = threading.Thread(target=self._serve, args=(connection,), name="key-broker", daemon=True)
        with self._lock:
            self._open[connection] = thread
            self._metrics.connections.set(len(self._open))
        try:
            thread.start()
        except RuntimeError:  # no thread available
            self._close(connection)

    def _serve(self, connection: Socket) -> None:
        """Answer the requests of a connection until it is closed, silent for too long, or breaks the protocol."""
        try:
            with contextlib.suppress(OSError):
                while (request := receive(connection, idle_s=self._idle_s, read_s=self._read_s)) is not None:
                    send(connection, self._answer(request), timeout_s=self._read_s)
        except InvalidRequest as error:
            with contextlib.suppress(OSError):
                send(connection, error_to_plain(error), timeout_s=_POLL_S)
        finally:
            self._close(connection)

    def _answer(self, request: dict[str, object]) -> dict[str, object]:
        if request == PING:  # needs no token: a process that may connect may know that the broker is alive
            return {"ok": True, "result": None}
        return self._metrics.measure(request, self._gate.answer)

    def _close(self, connection: Socket) -> None:
        with self._lock:
            self._open.pop(connection, None)
            self._metrics.connections.set(len(self._open))
            connection.close()
        self._slots.release()

    def _drain(self) -> None:
        """Wait until the running requests have ended, and read no further requests."""
        with self._lock:
            open_now = dict(self._open)
            for connection in open_now:
                with contextlib.suppress(OSError):
                    connection.shutdown(SHUT_RD)
        for thread in open_now.values():
            thread.join(STOP_S)


def peer_allowed(uid: int, *, own: int) -> bool:
    """Return whether a user may connect: only the broker's own user and root."""
    return uid in (own, 0)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[Socket]:
    """Yield a listening socket, and remove its file at the end."""
    ensure_private_folder(path.parent)
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_listening(path) from None
        _remove_stale(path)
        with Socket(AF_UNIX, SOCK_STREAM) as listener:
            temporary = path.with_name(f"{path.name}.new")
            temporary.unlink(missing_ok=True)
            listener.bind(str(temporary))
            temporary.chmod(0o600)
            listener.listen(128)
            listener.settimeout(_POLL_S)
            temporary.rename(path)  # the socket appears under its name only when it is ready
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a broker that no longer runs."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is not a socket; the key broker does not replace it. Choose another path."
            )
    except FileNotFoundError:
        return
    with Socket(AF_UNIX, SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise ConfigError(
                f"Cannot find out whether a key broker listens at {path}: {error.strerror}."
            ) from error
    raise _already_listening(path)


def _already_listening(path: Path) -> ConfigError:
    return ConfigError(f"A key broker already listens at {path}. Stop it first, or choose another path.")
