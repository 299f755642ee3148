"""Where a replica listens for calls from other deployments: on its node's own address, and nowhere else.

Ray 2.60 starts a gRPC server for such calls in every replica, on all addresses of the machine, and it unpickles what it
is sent. TLS between Ray's processes asks a stranger for a certificate; but what listens on loopback he does not reach
at all, whether TLS is on or off. Ray has no setting for it, so the function that opens the port is exchanged here.
"""

from __future__ import annotations

import sys

import ray
from ray._common.tls_utils import add_port_to_grpc_server

_REPLICA = "ray.serve._private.replica"
_EVERYWHERE = "[::]"


def listen_on_own_address() -> None:
    """Keep this replica's gRPC server on its node's address; to be called before its constructor returns.

    Outside a replica there is no such server, and nothing happens.
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
