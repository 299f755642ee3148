"""Tell load balancers that an edge will end, before it ends."""

from __future__ import annotations

import contextlib
import socket
import time

from cluster.session import ClusterRecord

NOTICE_S = 3.0
"""Seconds for which the edge still answers requests after it has become not ready."""
ADMIN_SOCKET = "edge.sock"
LEAVING = "proc.leaving"
"""Variable of HAProxy. While it is true, the edge is not ready."""
LEAVE_COMMAND = f"experimental-mode on; set var {LEAVING} bool(true)"


def announce_end_of_edge(record: ClusterRecord) -> None:
    """Answer `GET /v2/health/ready` with 503 for `NOTICE_S`, so that load balancers see it; answer other requests.

    If the edge's socket does not answer, return at once.
    """
    if not record.has_edge:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(NOTICE_S)
        connection.connect(f"{record.runtime_folder}/{ADMIN_SOCKET}")
        connection.sendall(f"{LEAVE_COMMAND}\n".encode())
        connection.recv(1024)
        time.sleep(NOTICE_S)
