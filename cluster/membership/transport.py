"""Connections between the nodes and the head: TLS 1.3 on the head's port for nodes.

Messages are those of the key broker's socket (`keys/wire.py`). The head shows its node certificate. A client without a
certificate can only ask to join; every other request needs the certificate of a node of this cluster.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import logging
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from prometheus_client import CollectorRegistry

from cluster.errors import ConfigError
from cluster.membership.metrics import NodeMetrics
from cluster.security.tls.certificates import CA_NAME, NODE_CERTIFICATE_NAME, NODE_KEY_NAME

MAX_CONNECTIONS = 512
MAX_UNKNOWN = 256
"""Most connections whose client has shown no certificate (yet). The rest is for nodes."""
MAX_UNKNOWN_PER_ADDRESS = 32
"""A relay opens many connections at once when replicas start, and each is unknown until its handshake ends."""
HANDSHAKE_S = 5.0
CONNECT_S = 3.0
_POLL_S = 0.5
LOG = logging.getLogger("falaj.nodes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """The client of a connection."""

    address: str
    shown: bytes | None
    """The certificate that it showed (DER); None if it showed none."""

    @property
    def certificate(self) -> str | None:
        """SHA-256 of the certificate that it showed, in hex; None if it showed none."""
        return None if self.shown is None else hashlib.sha256(self.shown).hexdigest()


Serve = Callable[[ssl.SSLSocket, Peer], None]


class Server:
    """Accepts connections on the head's port for nodes, and serves each in a thread.

    Args:
        address: `host` and `port` to listen on.
        tls: folder with the certificates. They are read for each connection, so renewed ones are used at once.
        serve: serves one connection until it returns. OSErrors end the connection.
        metrics: counts connections; not exported by default.
    """

    def __init__(
        self, address: tuple[str, int], *, tls: Path, serve: Serve, metrics: NodeMetrics | None = None
    ) -> None:
        self._address = address
        self._tls = tls
        self._serve = serve
        self._metrics = metrics or NodeMetrics(CollectorRegistry())
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._unknown: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.ready = threading.Event()

    def run(self, stopped: threading.Event) -> None:
        """Listen until `stopped` is set.

        Raises:
            OSError: the port cannot be used.
        """
        with socket.create_server(self._address, backlog=128) as listener:
            listener.settimeout(_POLL_S)
            self.ready.set()
            while not stopped.is_set():
                try:
                    connection, peer = listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:  # no file descriptors left, or the caller disconnected at once
                    LOG.warning("a connection was not accepted: %s", error.strerror)
                    stopped.wait(_POLL_S)
                    continue
                self._admit(connection, peer[0])

    def _admit(self, connection: socket.socket, address: str) -> None:
        if not self._slots.acquire(blocking=False):
            self._metrics.refused_connections.inc()
            connection.close()
            return
        if not self._count_unknown(address):
            self._metrics.refused_connections.inc()
            connection.close()
            self._slots.release()
            return
        thread = threading.Thread(target=self._run, args=(connection, address), name="node", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread available
            connection.close()
            self._forget_unknown(address)
            self._slots.release()

    def _count_unknown(self, address: str) -> bool:
        """Count a new connection; return False if there are too many without a certificate."""
        with self._lock:
            if self._unknown.total() >= MAX_UNKNOWN or self._unknown[address] >= MAX_UNKNOWN_PER_ADDRESS:
                return False
            self._unknown[address] += 1
            return True

    def _forget_unknown(self, address: str) -> None:
        with self._lock:
            self._unknown[address] -= 1
            if not self._unknown[address]:
                del self._unknown[address]

    def _run(self, connection: socket.socket, address: str) -> None:
        is_unknown = True
        try:
            with self._metrics.connections.track_inprogress(), connection, contextlib.suppress(OSError):
                connection.settimeout(HANDSHAKE_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._context().wrap_socket(connection, server_side=True) as secured:
                    shown = secured.getpeercert(binary_form=True)
                    if shown:
                        self._forget_unknown(address)
                        is_unknown = False
                    self._serve(secured, Peer(address=address, shown=shown))
        finally:
            if is_unknown:
                self._forget_unknown(address)
            self._slots.release()

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self._tls / NODE_CERTIFICATE_NAME, self._tls / NODE_KEY_NAME)
        context.load_verify_locations(self._tls / CA_NAME)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context


def client_context(*, authority: str) -> ssl.SSLContext:
    """Return the TLS settings of a client without a certificate, for joining.

    Args:
        authority: certificate of the cluster's authority, as PEM.
    """
    context = ssl.create_default_context(cadata=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def node_context(tls: Path) -> ssl.SSLContext:
    """Return the TLS settings of a client that shows its node certificate.

    Raises:
        ConfigError: the certificate has expired, or a file is missing.
    """
    try:
        context = client_context(authority=(tls / CA_NAME).read_text())
        context.load_cert_chain(tls / NODE_CERTIFICATE_NAME, tls / NODE_KEY_NAME)
        certificate = x509.load_pem_x509_certificate((tls / NODE_CERTIFICATE_NAME).read_bytes())
    except OSError as error:
        raise ConfigError(f"This node's certificates in {tls} cannot be read: {error.strerror}.") from None
    if certificate.not_valid_after_utc < dt.datetime.now(dt.UTC):
        raise ConfigError(
            f"This node's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}. Run "
            "`python -m cluster.leave`, then join again with a new join token."
        )
    return context


def connect(head: str, context: ssl.SSLContext, *, own_address: str) -> ssl.SSLSocket:
    """Open a connection to the head.

    Args:
        head: `host:port` of the head.
        context: TLS settings.
        own_address: address of this node, which the head must see.

    Raises:
        ConfigError: the head's certificate is not valid.
        OSError: the head does not answer.
    """
    host, port = split_address(head)
    connection = socket.create_connection((host, port), timeout=CONNECT_S, source_address=(own_address, 0))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise ConfigError(
            f"The certificate of {head} is not one of this cluster's head: {error.verify_message}. Check the address; "
            "if the head has a new authority or the certificate has expired, run `python -m cluster.up` there and "
            "join with a new token."
        ) from None
    except BaseException:
        connection.close()
        raise


def split_address(head: str) -> tuple[str, int]:
    """Return host and port of `host:port`.

    Raises:
        ConfigError: it has another form.
    """
    host, _, port = head.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"head must be host:port, such as 10.0.0.1:8403, got '{head}'.")
    return host, int(port)
