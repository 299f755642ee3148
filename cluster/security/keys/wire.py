"""Messages on the broker's socket: a length of four bytes, then a JSON object. Errors are sent by class name.

Both sides raise the same error class. A class that is not in `_ERRORS` is sent as its nearest base class in `_ERRORS`.
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
"""Request that checks, without a token, whether the broker is alive. It is not an operation of the key store."""
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
        OSError: the other side closed the connection or does not read.
    """
    body = json.dumps(message).encode()
    if len(body) > MAX_BYTES:
        raise InvalidRequest(
            f"A message to or from the key broker has at most {MAX_BYTES} bytes, got {len(body)}."
        )
    connection.settimeout(timeout_s)
    connection.sendall(len(body).to_bytes(_HEADER_BYTES, "big") + body)


def receive(connection: socket.socket, *, idle_s: float, read_s: float) -> dict[str, object] | None:
    """Return one message, or None if the other side closed the connection before a message.

    Args:
        connection: a socket of type SOCK_STREAM.
        idle_s: seconds to wait for the first byte.
        read_s: seconds within which the rest of the message must arrive.

    Raises:
        InvalidRequest: the message is too long or not a JSON object.
        OSError: the connection was closed within a message, or was too slow (TimeoutError).
    """
    connection.settimeout(idle_s)
    first_bytes = connection.recv(_HEADER_BYTES)
    if not first_bytes:
        return None
    deadline = time.monotonic() + read_s
    header = first_bytes + _receive_exactly(connection, _HEADER_BYTES - len(first_bytes), deadline=deadline)
    size = int.from_bytes(header, "big")
    if size > MAX_BYTES:
        raise InvalidRequest(f"A message to the key broker has at most {MAX_BYTES} bytes, got {size}.")
    try:
        message = json.loads(_receive_exactly(connection, size, deadline=deadline).decode())
    except (ValueError, RecursionError):
        raise InvalidRequest("A message to the key broker must be a JSON object.") from None
    if not isinstance(message, dict):
        raise InvalidRequest("A message to the key broker must be a JSON object.")
    return message


def error_to_plain(error: FalajError) -> dict[str, object]:
    """Return the answer that reports an error."""
    kind = next(
        (kind for kind in type(error).__mro__ if _ERRORS.get(kind.__name__) is kind), KeyStoreUnavailable
    )
    return {"ok": False, "error": kind.__name__, "message": str(error)}


def error_from_plain(answer: dict[str, object]) -> FalajError:
    """Return the error of an answer."""
    kind = _ERRORS.get(str(answer.get("error")), KeyStoreUnavailable)
    return kind(str(answer.get("message", "The key broker gave no reason.")))


def check_socket_path(path: str) -> str:
    """Return the path if it is short enough for a Unix socket.

    Raises:
        ConfigError: the path is too long.
    """
    size = len(path.encode(errors="surrogateescape"))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"The key broker's socket path has {size} bytes, but at most {MAX_SOCKET_PATH_BYTES} are allowed: {path}. "
            "Use a shorter runtime folder."
        )
    return path


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end. The kernel recorded it when the connection was made."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def _receive_exactly(connection: socket.socket, size: int, *, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("The message took too long.")
        connection.settimeout(left_s)
        part = connection.recv(min(size - len(parts), 65536))
        if not part:
            raise ConnectionError("The connection was closed within a message.")
        parts += part
    return bytes(parts)
