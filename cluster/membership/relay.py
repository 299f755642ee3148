"""`python -m cluster.membership.relay`: the key broker of a node that joined.

Its processes use the same socket as on the head, with their own tokens. By default the node has no key store: the relay
passes requests for keys to the head, whose key broker decides. The relay of a node with its own login to Vault
(`cluster.join vault=true`) decides itself, by the same policies, and can use keys without the head.

The relay also makes Ray's dashboard reachable on the node's loopback address and the job service at the node's own
socket, and updates the development issuer's public keys of the node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from cluster.entrypoint import job
from cluster.errors import AccessDenied, FalajError
from cluster.host.port_owner import PortState, client_uid
from cluster.host.signals import set_on_signal
from cluster.ledger import open_ledger
from cluster.membership.head_client import ANSWER_S, HeadClient
from cluster.membership.service import DASHBOARD, JOBS
from cluster.membership.splice import splice
from cluster.metrics import new_registry, serve_metrics
from cluster.security.keys.broker import Answering, Broker
from cluster.security.keys.gate import Operation
from cluster.security.keys.guarded import guarded_store
from cluster.security.keys.metrics import BrokerMetrics
from cluster.security.keys.wire import error_to_plain, receive, send
from cluster.security.tokens.issuer import JWKS_NAME, replace_private_file
from cluster.session import ClusterRecord, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import local

FOR_THE_HEAD = ("intent", "deposit", "withdraw", "service_token")
"""Requests of the node's processes that the head's service answers itself."""
CHANGES = (Operation.ensure, Operation.rotate, Operation.revoke)
"""Requests that change keys. The head's broker decides them, also for a node with its own login to Vault. Two brokers
that change a description at the same time would each check an outdated one. So a node's login needs no rights to change
keys."""
KEYS_EVERY_S = 30.0
MAX_TUNNELS = 64
RETRY_S = 5.0
_POLL_S = 0.5
LOG = logging.getLogger("falaj.nodes")


class Relay:
    """Passes the requests of the node's processes to the head.

    Args:
        head: the connection to the head.
        keys: answers requests for keys, if this node has its own key store; by default the head does.
    """

    def __init__(self, head: HeadClient, *, keys: Answering | None = None) -> None:
        self._head = head
        self._keys = keys

    def answer(self, request: dict[str, object]) -> dict[str, object]:
        """Return the answer, or the error that the head did not answer."""
        operation = request.get("op")
        try:
            if operation in FOR_THE_HEAD:
                return self._head.exchange(request)
            if self._keys is not None and operation not in CHANGES:
                return self._keys.answer(request)
            repeatable = operation not in (Operation.rotate, Operation.revoke)
            return self._head.exchange({"op": "key", "request": request}, repeatable=repeatable)
        except FalajError as error:
            return error_to_plain(error)

    def refuse_connection(self, reason: str) -> dict[str, object]:
        """Return the answer to a connection of another user."""
        LOG.warning("a connection was refused: %s", reason)
        return error_to_plain(AccessDenied(f"The key broker refuses this connection: {reason}."))


def serve_dashboard(head: HeadClient, port: int, stopped: threading.Event) -> None:
    """Listen on loopback, and connect each client to the dashboard on the head. It asks for Ray's token."""
    _serve_tunnels(head, DASHBOARD, lambda: socket.create_server(("127.0.0.1", port)), stopped)


def serve_jobs(head: HeadClient, path: Path, stopped: threading.Event) -> None:
    """Listen at a private socket, and connect this node's edge to the job service on the head. It checks tokens."""

    def listen() -> socket.socket:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        return listener

    _serve_tunnels(head, JOBS, listen, stopped)


def _serve_tunnels(
    head: HeadClient, service: str, listen: Callable[[], socket.socket], stopped: threading.Event
) -> None:
    """Connect each client of a listener to a service on the head."""
    slots = threading.BoundedSemaphore(MAX_TUNNELS)

    def serve(client: socket.socket) -> None:
        try:
            with client, head.open() as connection:
                send(connection, {"op": service}, timeout_s=ANSWER_S)
                answer = receive(connection, idle_s=ANSWER_S, read_s=ANSWER_S)
                if answer is not None and answer.get("ok") is True:
                    splice(client, connection)
        except (OSError, FalajError) as error:
            LOG.warning("the head's %s cannot be reached: %s", service, error)
        finally:
            slots.release()

    def accept(listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except TimeoutError:
            return
        if not _is_own(client):
            client.close()
        elif slots.acquire(blocking=False):
            threading.Thread(target=serve, args=(client,), name=service, daemon=True).start()
        else:
            client.close()

    while not stopped.is_set():
        try:
            with listen() as listener:
                listener.settimeout(_POLL_S)
                while not stopped.is_set():
                    accept(listener)
        except OSError as error:  # another process has the port, or no file descriptors are left
            LOG.warning("this node cannot listen for the head's %s: %s", service, error.strerror)
            stopped.wait(RETRY_S)


def _is_own(client: socket.socket) -> bool:
    """Return whether a client is a process of the cluster's user. A socket file is private, so no other user has it."""
    if client.family == socket.AF_UNIX:
        return True
    try:
        uid = client_uid(client)
    except OSError:  # it has disconnected
        return False
    if uid in (os.geteuid(), 0, PortState.unknown):
        return True
    LOG.warning("a connection to the dashboard was refused: it comes from user %s", uid)
    return False


def follow_issuer(head: HeadClient, path: Path, stopped: threading.Event) -> None:
    """Keep the development issuer's public keys up to date."""
    while not stopped.wait(KEYS_EVERY_S):
        try:
            text = head.request("jwks")
            if isinstance(text, str) and text != path.read_text():
                replace_private_file(path, text.encode(), mode=0o644)
        except (OSError, FalajError) as error:
            LOG.warning("the issuer's keys cannot be read from the head: %s", error)


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    record: ClusterRecord = require_recorded_cluster(config)
    head, stopped, registry = HeadClient.of(record), threading.Event(), new_registry()
    serve_metrics(registry, port=record.ports.get("broker_metrics"))
    set_on_signal([signal.SIGTERM], stopped)
    if config.identity.issuer.url is None:
        jwks = local(record.layout.keys) / JWKS_NAME
        threading.Thread(target=follow_issuer, args=(head, jwks, stopped), name="issuer", daemon=True).start()
    dashboard = (head, record.ports["dashboard"], stopped)
    threading.Thread(target=serve_dashboard, args=dashboard, name="dashboard", daemon=True).start()
    jobs = (head, Path(record.jobs_socket), stopped)
    threading.Thread(target=serve_jobs, args=jobs, name="jobs", daemon=True).start()
    with own_keys(config, record, stopped=stopped) as keys:
        Broker(Relay(head, keys=keys), Path(record.key_socket), metrics=BrokerMetrics(registry)).run(stopped)


def own_keys(
    config: PlatformConfig, record: ClusterRecord, *, stopped: threading.Event
) -> AbstractContextManager[Answering | None]:
    """Return the key store of a node with its own login to Vault; None on other nodes."""
    if not record.own_vault:
        return contextlib.nullcontext()
    return guarded_store(config, open_ledger(config), stopped=stopped)


if __name__ == "__main__":
    main()
