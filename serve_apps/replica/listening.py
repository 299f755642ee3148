"""Let a replica's gRPC server listen on its node's own address only.

In every replica, Ray 2.60 starts a gRPC server for calls from other deployments. The server listens on all addresses of
the machine, and it unpickles what it receives. With TLS between Ray's processes, a client needs a certificate. But if
the server listens on loopback, other machines cannot reach it at all, with or without TLS. Ray has no setting for this,
so this module replaces the function that opens the port.
"""

from __future__ import annotations

import sys

import ray
from ray._common.tls_utils import add_port_to_grpc_server

_REPLICA = "ray.serve._private.replica"
_EVERYWHERE = "[::]"


def listen_on_own_address() -> None:
    """Bind this replica's gRPC server to its node's address. Call this before the application's constructor returns.

    Outside a replica, this does nothing, because there is no such server.
    """
    replica = sys.modules.get(_REPLICA)
    if replica is not None:
        vars(replica)["add_port_to_grpc_server"] = _on_own_address


def _on_own_address(server: object, address: str) -> int:
    host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    own = f"[{host}]" if ":" in host else host
    port: int = add_port_to_grpc_server(  # type: ignore[no-untyped-call]
        server, address.replace(_EVERYWHERE, own)
    )
    return port
