"""Let load balancers notice that an edge will end, before it ends."""

from __future__ import annotations

import contextlib
import socket
import time

from cluster.session import ClusterRecord

NOTICE_S = 3.0
"""How long the edge still answers requests while it is not ready any more."""
ADMIN_SOCKET = "edge.sock"
LEAVING = "proc.leaving"
"""Variable of HAProxy. While it is true, the edge is not ready."""
LEAVE_COMMAND = f"experimental-mode on; set var {LEAVING} bool(true)"


def announce_end_of_edge(record: ClusterRecord) -> None:
    """Make `GET /v2/health/ready` answer 503, and wait until load balancers have seen it. Other requests are answered.

    If the edge does not answer, it is ended without notice.
    """
    if not record.has_edge:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(NOTICE_S)
        connection.connect(f"{record.runtime_folder}/{ADMIN_SOCKET}")
        connection.sendall(f"{LEAVE_COMMAND}\n".encode())
        connection.recv(1024)
        time.sleep(NOTICE_S)
