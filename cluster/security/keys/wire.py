"""What goes over the broker's socket: a length of four bytes, then a JSON object; and errors by their name.

Errors are the exact classes on both sides. A class that is not in the table travels as its nearest ancestor.
"""

from __future__ import annotations

import json
import socket
import struct
import time

from cluster.errors import (
    AccessDenied,
    ConfigError,
    FalajError,
    InvalidRequest,
    RefusedError,
    Unauthenticated,
)
from cluster.security.keys.store import (
    KeyEncryptionKeyWrong,
    KeyFileRefused,
    KeyNameInvalid,
    KeyNotFound,
    KeyRevoked,
    KeyringDamaged,
    KeyStoreUnavailable,
    WrappedKeyInvalid,
)

MAX_BYTES = 1024 * 1024
MAX_SOCKET_PATH_BYTES = 97
PING: dict[str, object] = {"op": "ping"}
"""Asks whether the broker lives, without a token; it is no operation of a key store."""
_HEADER_BYTES = 4
_ERRORS: dict[str, type[FalajError]] = {
    kind.__name__: kind
    for kind in (
        AccessDenied,
        ConfigError,
        InvalidRequest,
        KeyEncryptionKeyWrong,
        KeyFileRefused,
        KeyNameInvalid,
        KeyNotFound,
        KeyringDamaged,
        KeyRevoked,
        KeyStoreUnavailable,
        RefusedError,
        Unauthenticated,
        WrappedKeyInvalid,
    )
}


def send(connection: socket.socket, message: dict[str, object], *, timeout_s: float) -> None:
    """Send one message.

    Raises:
        InvalidRequest: the message is too long.
        OSError: the other side is gone or does not read.
    """
    body = json.dumps(message).encode()
    if len(body) > MAX_BYTES:
        raise InvalidRequest(
            f"A message to or from the key broker has at most {MAX_BYTES} bytes, got {len(body)}."
        )
    connection.settimeout(timeout_s)
    connection.sendall(len(body).to_bytes(_HEADER_BYTES, "big") + body)


def receive(connection: socket.socket, *, idle_s: float, read_s: float) -> dict[str, object] | None:
    """One message; none if the other side closed the connection in front of it.

    Args:
        connection: a stream socket.
        idle_s: how long to wait for its first byte.
        read_s: how long the rest may take in all.

    Raises:
        InvalidRequest: it is too long or not a JSON object.
        OSError: closed in the middle, or too slow (TimeoutError).
    """
    connection.settimeout(idle_s)
    begun = connection.recv(_HEADER_BYTES)
    if not begun:
        return None
    deadline = time.monotonic() + read_s
    header = begun + _exactly(connection, _HEADER_BYTES - len(begun), deadline=deadline)
    size = int.from_bytes(header, "big")
    if size > MAX_BYTES:
        raise InvalidRequest(
            f"A message to the key broker has at most {MAX_BYTES} bytes, this one says {size}."
        )
    try:
        message = json.loads(_exactly(connection, size, deadline=deadline).decode())
    except (ValueError, RecursionError):
        raise InvalidRequest("A message to the key broker is a JSON object.") from None
    if not isinstance(message, dict):
        raise InvalidRequest("A message to the key broker is a JSON object.")
    return message


def error_to_plain(error: FalajError) -> dict[str, object]:
    """An error as an answer."""
    kind = next(
        (kind for kind in type(error).__mro__ if _ERRORS.get(kind.__name__) is kind), KeyStoreUnavailable
    )
    return {"ok": False, "error": kind.__name__, "message": str(error)}


def error_from_plain(answer: dict[str, object]) -> FalajError:
    """The error in an answer."""
    kind = _ERRORS.get(str(answer.get("error")), KeyStoreUnavailable)
    return kind(str(answer.get("message", "The key broker gave no reason.")))


def check_socket_path(path: str) -> str:
    """The path, if a Unix socket can be bound there.

    Raises:
        ConfigError: it is too long.
    """
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"The key broker's socket path has {size} bytes, a Unix socket's ends at {MAX_SOCKET_PATH_BYTES}: {path}. "
            "Use a shorter runtime folder."
        )
    return path


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end when it connected, as the kernel saw it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def _exactly(connection: socket.socket, size: int, *, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("The message took too long.")
        connection.settimeout(left_s)
        part = connection.recv(min(size - len(parts), 65536))
        if not part:
            raise ConnectionError("The connection was closed in the middle of a message.")
        parts += part
    return bytes(parts)
