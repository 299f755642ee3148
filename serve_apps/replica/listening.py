"""Let the servers of Serve's processes listen on their node's own address only, and with TLS if that is not loopback.

In every replica, Ray 2.60 starts a gRPC server for calls from other deployments. The server listens on all addresses of
the machine, and it unpickles what it receives. With TLS between Ray's processes, a client needs a certificate. But if
the server listens on loopback, other machines cannot reach it at all, with or without TLS.

For HTTP, Serve has one host and one certificate for all nodes: those of the head, where Serve's proxy runs. A replica
on another node needs its own node's. Ray has no setting for either, so this module replaces the functions that open the
ports in a replica. A server also uses a renewed certificate for new connections.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import sys
from pathlib import Path
from typing import Any

import ray
import uvicorn
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions

from cluster.errors import ConfigError
from cluster.host.this_node import LOOPBACK_ADDRESS, RECORD_VARIABLE, this_node
from serve_apps.replica.targets import is_loopback

_REPLICA, _PROXY = "ray.serve._private.replica", "ray.serve._private.proxy"
_EVERYWHERE = "[::]"
FOLLOW_EVERY_S = 10.0
LOG = logging.getLogger("falaj.replica")
_start_server = http_util.start_asgi_http_server


def listen_on_own_address() -> None:
    """Bind this replica's gRPC server to its node's address. Call this before the application's constructor returns.

    Outside a replica, this does nothing, because there is no such server.
    """
    replica = sys.modules.get(_REPLICA)
    if replica is not None:
        vars(replica)["add_port_to_grpc_server"] = _on_own_address


def answer_on_own_address() -> None:
    """Bind this replica's HTTP server to its node's address, and let it follow the node's certificate.

    Call it before the server starts, in a replica or in Serve's proxy. Elsewhere this does nothing. Without it, a
    replica on another node than the head would not start, because the head's address is not its own.
    """
    for name in (_REPLICA, _PROXY):
        module = sys.modules.get(name)
        if module is not None:
            vars(module)["start_asgi_http_server"] = _start_on_own_address


def own_address() -> str:
    """Return this node's address."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def own_options(options: HTTPOptions, *, address: str) -> HTTPOptions:
    """Return a replica's options with its node's address and certificate, unless Serve was given loopback.

    The certificate is the one that Ray's processes of this node have (`cluster/security/tls`).

    Raises:
        ConfigError: this node's record cannot be read, so requests without the edge's secret would not be refused.
    """
    if is_loopback(options.host or LOOPBACK_ADDRESS):
        return options
    if this_node() is None:
        raise ConfigError(f"The record of this node, {os.environ.get(RECORD_VARIABLE)}, cannot be read.")
    own = {
        "host": address,
        "ssl_certfile": os.environ["RAY_TLS_SERVER_CERT"],
        "ssl_keyfile": os.environ["RAY_TLS_SERVER_KEY"],
    }
    return options.model_copy(update=own)


async def _start_on_own_address(app: Any, http_options: HTTPOptions, **arguments: Any) -> Any:
    options = own_options(http_options, address=own_address())
    task, server = await _start_server(app, options, **arguments)
    if options.ssl_certfile and options.ssl_keyfile:
        following = asyncio.get_running_loop().create_task(
            follow_certificate(server.config, Path(options.ssl_certfile), Path(options.ssl_keyfile))
        )
        task.add_done_callback(lambda _: following.cancel())
    return task, server


async def follow_certificate(
    config: uvicorn.Config, certificate: Path, key: Path, *, every_s: float = FOLLOW_EVERY_S
) -> None:
    """Use a renewed certificate for new connections of a server. A key and a certificate must match."""
    seen = _version(certificate)
    while True:
        await asyncio.sleep(every_s)
        try:
            if config.ssl is None or (version := _version(certificate)) == seen:
                continue
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            config.ssl.load_cert_chain(certificate, key)
            seen = version
        except OSError as error:  # SSLError is a subclass
            LOG.warning(
                "the certificate %s cannot be used, so the previous one stays: %s", certificate, error
            )


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _on_own_address(server: object, address: str) -> int:
    host = own_address()
    own = f"[{host}]" if ":" in host else host
    port: int = add_port_to_grpc_server(  # type: ignore[no-untyped-call]
        server, address.replace(_EVERYWHERE, own)
    )
    return port
