"""HTTP to a server on this machine that must be the cluster's own, because the request carries its token.

A port of a process that has died is anybody's. So before a request is sent, the kernel is asked whose socket listens
there.
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
_UID_AT = _HEADER_BYTES + 64
"""In the answer: behind four bytes, the socket's 48, and three numbers (`struct inet_diag_msg`)."""


class NotOurServer(ConnectionError):
    """Another user's process listens at a port of the cluster."""


def open_own(request: urllib.request.Request, *, owner: int, timeout_s: float) -> Any:
    """Open an http request to a server on loopback whose process belongs to `owner` or root.

    Raises:
        NotOurServer: somebody else's process listens there; nothing was sent.
        OSError: as `urllib.request.urlopen`.
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
    """Go on only if a connection leads to a process of a user or of root, as far as it leads to this machine: of
    another one the kernel here knows nothing.

    Raises:
        NotOurServer: another user's process listens there, or none does any more.
    """
    address, port = connection.getpeername()[:2]
    if not ipaddress.ip_address(address).is_loopback:
        return
    uid = listeners_user(address, port)
    if uid is Nobody.listens or (uid is not None and uid not in (owner, 0)):
        whose = "no process" if uid is Nobody.listens else f"a process of user {uid}"
        raise NotOurServer(
            f"At port {port} of this machine {whose} listens, not the cluster's own: no token was sent. "
            "`python -m cluster.status` shows what is missing; `python -m cluster.up` starts it again."
        )


class Nobody(enum.Enum):
    """In the place of a user."""

    listens = "listens"


def listeners_user(address: str, port: int) -> int | Nobody | None:
    """The user whose process gets new connections to an address of this machine; None where the kernel does not say.

    It is asked for this one socket by sock_diag(7), in some microseconds: a table of all sockets takes milliseconds.
    """
    parsed = ipaddress.ip_address(address)
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    local = parsed.packed.ljust(16, b"\0")
    asked = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
    asked += struct.pack("!HH", port, 0) + local + bytes(16) + struct.pack("=III", 0, _NO_COOKIE, _NO_COOKIE)
    header = struct.pack("=IHHII", _HEADER_BYTES + len(asked), _SOCK_DIAG_BY_FAMILY, _REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1.0)
            kernel.sendto(header + asked, (0, 0))
            answer = kernel.recv(4096)
    except (OSError, AttributeError):  # a sandbox that forbids it, or no Linux
        return None
    kind = struct.unpack_from("=H", answer, 4)[0]
    if kind == _ERROR:
        return Nobody.listens if -struct.unpack_from("=i", answer, _HEADER_BYTES)[0] == errno.ENOENT else None
    return int(struct.unpack_from("=I", answer, _UID_AT)[0])
