"""Sends HTTP requests with the cluster's token only to the cluster's own servers on this machine.

When a process dies, any user can take its port. So before a request is sent, this module asks the kernel which user
owns the listening socket.
"""

from __future__ import annotations

import enum
import errno
import http.client
import ipaddress
import socket
import struct
import urllib.error
import urllib.request
from typing import Any

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _REQUEST, _ERROR = 4, 20, 1, 2
_ALL_STATES, _NO_COOKIE = 0xFFFFFFFF, 0xFFFFFFFF
_HEADER_BYTES = 16
_UID_OFFSET = _HEADER_BYTES + 64
"""Offset of the uid in the reply. In `struct inet_diag_msg`, 4 bytes, the 48 bytes of the socket's id, and three
4-byte numbers come before the uid."""


class NotOurServer(ConnectionError):
    """A port of the cluster belongs to another user's process, or to no process."""


class PortState(enum.Enum):
    """Reason why the user who listens on a port is unknown."""

    closed = "closed"
    """No process listens on the port."""
    unknown = "unknown"
    """The kernel does not say which process listens."""


def open_own(request: urllib.request.Request, *, owner: int, timeout_s: float) -> Any:
    """Send an HTTP request to a loopback server whose process belongs to `owner` or root, and return the response.

    Raises:
        NotOurServer: Another user's process, or no process, listens on the port. Nothing was sent.
        OSError: The request failed, as in `urllib.request.urlopen`.
    """

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            require_own_peer(self.sock, owner=owner)

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Connection, req)

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), Handler)
    try:
        return opener.open(request, timeout=timeout_s)
    except urllib.error.URLError as error:
        if isinstance(error.reason, NotOurServer):
            raise error.reason from None
        raise


def require_own_peer(connection: socket.socket, *, owner: int) -> None:
    """Require that the server of a loopback connection belongs to `owner` or root.

    Connections to other machines are not checked, because this kernel does not know their processes.

    Raises:
        NotOurServer: Another user's process, or no process, listens on the port.
    """
    address, port = connection.getpeername()[:2]
    if not ipaddress.ip_address(address).is_loopback:
        return
    uid = listener_uid(address, port)
    if uid not in (PortState.unknown, owner, 0):
        listener = "no process" if uid is PortState.closed else f"a process of user {uid}"
        raise NotOurServer(
            f"On port {port} of this machine {listener} listens, not the cluster's own: no token was sent. "
            "`python -m cluster.status` shows what is missing; `python -m cluster.up` starts it again."
        )


def client_uid(connection: socket.socket) -> int | PortState:
    """Return the user id of the client of an accepted loopback connection."""
    return _socket_uid(connection.getpeername()[:2], peer=connection.getsockname()[:2])


def listener_uid(address: str, port: int) -> int | PortState:
    """Return the user id of the process that gets new connections to an address of this machine."""
    return _socket_uid((address, port), peer=None)


def _socket_uid(own: tuple[str, int], *, peer: tuple[str, int] | None) -> int | PortState:
    """Return the user id of the socket with an own address and that of its peer; None is a listening socket.

    It queries only this socket, with sock_diag(7). That takes microseconds; reading the table of all sockets would take
    milliseconds.
    """
    parsed = ipaddress.ip_address(own[0])
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    local = parsed.packed.ljust(16, b"\0")
    remote = bytes(16) if peer is None else ipaddress.ip_address(peer[0]).packed.ljust(16, b"\0")
    query = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
    query += (
        struct.pack("!HH", own[1], peer[1] if peer else 0)
        + local
        + remote
        + struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
    )
    header = struct.pack("=IHHII", _HEADER_BYTES + len(query), _SOCK_DIAG_BY_FAMILY, _REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1.0)
            kernel.sendto(header + query, (0, 0))
            reply = kernel.recv(4096)
    except (OSError, AttributeError):  # a sandbox forbids the query, or this is not Linux
        return PortState.unknown
    if struct.unpack_from("=H", reply, 4)[0] == _ERROR:
        code = -struct.unpack_from("=i", reply, _HEADER_BYTES)[0]
        return PortState.closed if code == errno.ENOENT else PortState.unknown
    return int(struct.unpack_from("=I", reply, _UID_OFFSET)[0])
