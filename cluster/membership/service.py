"""The head's answers to nodes: who may join, keys from the key broker, intents, tokens of replicas, the dashboard.

Every request but `join` needs the certificate of a node of this cluster. Requests for keys go to the key broker with
the caller's own token, so the policies decide as on the head. The private key of the development issuer stays on the
head: a node gets tokens of replicas, and the intents of jobs whose random names its workers know.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from cluster.errors import AccessDenied, ConfigError, FalajError, InvalidRequest, Unauthenticated
from cluster.host.port_owner import require_own_peer
from cluster.ledger import Ledger
from cluster.ledger.events import NodeLeft
from cluster.membership import renewal
from cluster.membership.admission import Application, admit, fingerprint
from cluster.membership.members import Member, Members
from cluster.membership.metrics import NodeMetrics
from cluster.membership.release import release
from cluster.membership.splice import splice
from cluster.membership.transport import Peer
from cluster.security.keys.gate import NODE_REGION
from cluster.security.keys.store import KeyStoreUnavailable
from cluster.security.keys.wire import error_to_plain, receive, send
from cluster.security.tls.certificates import NODE_CERTIFICATE_NAME
from cluster.security.tokens.intent import read_token_file, remove_expired, write_intent
from cluster.security.tokens.issuer import JWKS_NAME, TOKEN_TTL_S, mint_token
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.storage import local

IDLE_S, READ_S = 600.0, 10.0
SILENT_S = 20.0
"""A node that has not reported for this time counts as dead, in seconds."""
JOIN_S = 60.0
"""A node that joined and has not reported for this time counts as dead, in seconds."""
_INTENT = re.compile(r"[A-Za-z0-9_.]{1,100}-[0-9a-f]{32}\.jwt")
_SERVICE = "service:"
_WORDS = re.compile(r"[A-Za-z ]{1,32}")
MAX_PARTS = 32
MAX_TUNNELS = 256
"""Largest number of connections from nodes to the dashboard and the job service. Callers open them, and nodes need the
other connections (`transport.MAX_CONNECTIONS`) for reports and keys."""
LEAVE_REASONS = ("left", "down", "failed")
DASHBOARD, JOBS = "dashboard", "jobs"
"""Services on the head that a node is connected to."""
LOG = logging.getLogger("falaj.nodes")


@dataclass(slots=True)
class Report:
    """The last report of a node."""

    parts: dict[str, str]
    """State of each part, as in `cluster.status`."""
    at: float
    """Monotonic seconds."""


@dataclass(kw_only=True, slots=True)
class NodeService:
    """Answers the requests of nodes.

    Args:
        config: the head's configuration.
        record: the head's record.
        ledger: where joining and leaving is recorded.
        members: the nodes.
        metrics: counts requests; not exported by default.
        clock: returns monotonic seconds.
    """

    config: PlatformConfig
    record: ClusterRecord
    ledger: Ledger
    members: Members
    metrics: NodeMetrics = field(default_factory=lambda: NodeMetrics(CollectorRegistry()))
    clock: Callable[[], float] = time.monotonic
    release: str = field(default_factory=release)
    """Release of the running cluster. The files on the disk may be another one later."""
    _reports: dict[str, Report] = field(default_factory=dict)
    _joined: dict[str, float] = field(default_factory=dict)
    """Monotonic seconds at which this service admitted a node."""
    _started_at: float = field(init=False)
    _joining: threading.Lock = field(default_factory=threading.Lock)
    _tunnels: threading.Semaphore = field(default_factory=lambda: threading.BoundedSemaphore(MAX_TUNNELS))

    def __post_init__(self) -> None:
        self._started_at = self.clock()
        self.metrics.count_nodes(alive=lambda: len(self._alive()), members=lambda: len(self.members.all()))

    def serve(self, connection: ssl.SSLSocket, peer: Peer) -> None:
        """Answer the requests of one connection until it is closed. Without a certificate, it has one short request."""
        idle_s = READ_S if peer.certificate is None else IDLE_S
        try:
            while (request := receive(connection, idle_s=idle_s, read_s=READ_S)) is not None:
                if (service := request.get("op")) in (DASHBOARD, JOBS):
                    if self._tunnels.acquire(blocking=False):
                        try:
                            self._connect_to(str(service), connection, peer)
                        finally:
                            self._tunnels.release()
                    else:
                        LOG.warning(
                            "%d nodes' connections to the %s are open: one more was refused",
                            MAX_TUNNELS,
                            service,
                        )
                    return
                answer = self.metrics.measure(request, functools.partial(self.answer, peer=peer))
                send(connection, answer, timeout_s=READ_S)
                if peer.certificate is None:
                    return
        except InvalidRequest as error:
            send(connection, error_to_plain(error), timeout_s=READ_S)

    def answer(self, request: dict[str, object], peer: Peer) -> dict[str, object]:
        """Return the answer to a request; never raises."""
        try:
            if request.get("op") == "key":
                return self._ask_broker(request.get("request"), self._require_node(peer))
            return {"ok": True, "result": self._result(request, peer)}
        except FalajError as error:
            if isinstance(error, Unauthenticated):
                LOG.warning("a request from %s was refused: %s", peer.address, error)
            return error_to_plain(error)
        except Exception as error:  # noqa: BLE001 (one bad request must not end the service)
            # Log only the type: the message of an unexpected error could contain a secret.
            LOG.error("a request from %s failed with %s", peer.address, type(error).__name__)
            return error_to_plain(
                KeyStoreUnavailable(f"The head failed with {type(error).__name__}. See keys/nodes.log there.")
            )

    def _result(self, request: dict[str, object], peer: Peer) -> object:
        operation = request.get("op")
        if operation == "join":
            return self._join(request, peer)
        node = self._require_node(peer)
        match operation:
            case "report":
                if node is not None:
                    self._reports[node.node_id] = Report(_states(request.get("parts")), self.clock())
                return {"session": self._session()}
            case "leave":
                self._record_leave(request, node)
                return None
            case "nodes":
                return self._nodes()
            case renewal.RENEW:
                certificate = renewal.renew(request, peer, node, record=self.record, ledger=self.ledger)
                self.members.refresh()
                return certificate
            case "intent":
                return read_token_file(self._intent_path(request))
            case "deposit":
                self._deposit(request)
                return None
            case "withdraw":
                self._intent_path(request).unlink(missing_ok=True)
                return None
            case "service_token":
                return self._service_token(request)
            case "jwks":
                return (local(self.record.layout.keys) / JWKS_NAME).read_text()
            case _:
                raise InvalidRequest(f"The head's service for nodes does not know '{operation}'.")

    def _join(self, request: dict[str, object], peer: Peer) -> dict[str, object]:
        with self._joining:
            answer = admit(
                Application.from_plain(request),
                peer,
                config=self.config,
                record=self.record,
                ledger=self.ledger,
                alive=self._alive(),
                own_release=self.release,
            )
            self._joined[str(answer["node_id"])] = self.clock()
            self.members.refresh()
            return answer

    def _record_leave(self, request: dict[str, object], node: Member | None) -> None:
        if node is None:
            raise InvalidRequest("The head cannot leave its cluster.")
        reason = request.get("reason")
        if reason not in LEAVE_REASONS:
            raise InvalidRequest(f"A node leaves for one of: {', '.join(LEAVE_REASONS)}.")
        event = NodeLeft(cluster_id=self.record.cluster_id, node_id=node.node_id, reason=str(reason))
        self.ledger.append(event, actor=f"node:{node.node_id}")
        self.members.refresh()

    def _require_node(self, peer: Peer) -> Member | None:
        """Return the node that asks; None is the head itself.

        Raises:
            Unauthenticated: the certificate is of no node of this cluster.
        """
        if peer.certificate is None:
            raise Unauthenticated(
                "This request needs a node's certificate. Join first: `python -m cluster.join`."
            )
        member = self.members.with_certificate(peer.certificate)
        if member is None and peer.certificate != self._own_certificate():
            raise Unauthenticated(
                "This machine is no node of the cluster, or it has left. Join with `python -m cluster.join`."
            )
        return member

    def _own_certificate(self) -> str:
        return fingerprint((local(self.record.layout.tls) / NODE_CERTIFICATE_NAME).read_bytes())

    def _alive(self) -> set[str]:
        """Return the nodes that reported lately, and those that could not report yet: they or this service are new."""
        now, alive = self.clock(), set()
        for node_id in self.members.all():
            if (report := self._reports.get(node_id)) is not None:
                is_alive = now - report.at < SILENT_S
            elif (joined_at := self._joined.get(node_id)) is not None:
                is_alive = now - joined_at < JOIN_S
            else:
                is_alive = now - self._started_at < SILENT_S
            if is_alive:
                alive.add(node_id)
        return alive

    def _nodes(self) -> list[dict[str, object]]:
        self.members.refresh()
        now, alive = self.clock(), self._alive()
        return [
            {
                "node_id": member.node_id,
                "name": member.name,
                "address": member.address,
                "region": member.region,
                "joined_at": member.joined_at,
                "alive": member.node_id in alive,
                "silent_s": round(now - report.at) if report else None,
                "parts": report.parts if report else {},
            }
            for member in self.members.all().values()
            for report in (self._reports.get(member.node_id),)
        ]

    def _session(self) -> str:
        """Return the name of Ray's session on the head. A new head has a new one, and nodes must start Ray again."""
        try:
            return Path(f"{self.record.temp_dir}/session_latest").readlink().name
        except OSError:
            return ""

    def _intent_path(self, request: dict[str, object]) -> Path:
        name = request.get("name")
        if not isinstance(name, str) or not _INTENT.fullmatch(name):
            raise InvalidRequest("The name of an intent is invalid.")
        return local(self.record.layout.keys) / "intents" / name

    def _deposit(self, request: dict[str, object]) -> None:
        path, intent = self._intent_path(request), request.get("intent")
        if not isinstance(intent, str):
            raise InvalidRequest("An intent must be text.")
        intents = Trust.of(self.config.identity.issuer, self.record.layout).intents
        new = intents.verify(intent, entrypoint=path.name.rpartition("-")[0])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_expired(path.parent)
        if path.exists():
            with contextlib.suppress(Unauthenticated):  # it has expired
                if intents.verify(read_token_file(path)).principal.subject != new.principal.subject:
                    raise AccessDenied("The intent of this name is another subject's.")
        write_intent(path, intent)

    def _service_token(self, request: dict[str, object]) -> str:
        subject, purpose = request.get("subject"), request.get("purpose")
        if not isinstance(subject, str) or not isinstance(purpose, str):
            raise InvalidRequest("A replica's token needs a subject and a purpose.")
        if not subject.startswith(_SERVICE):
            raise AccessDenied(
                f"The head issues tokens of replicas only ({_SERVICE}…), not of '{subject[:100]}'."
            )
        if self.config.identity.issuer.url is not None:
            raise ConfigError(
                "This cluster's issuer is not the development issuer. Set identity.service_token_file."
            )
        return mint_token(
            self.record.layout, subject=subject, role=Role.service, purpose=purpose, ttl_s=TOKEN_TTL_S
        )

    def _ask_broker(self, request: object, node: Member | None) -> dict[str, object]:
        if not isinstance(request, dict):
            raise InvalidRequest("A request for a key must be an object.")
        # The region comes from the ledger. A node must not choose it.
        request = {**request, NODE_REGION: None if node is None else node.region}
        try:
            with socket.socket(AF_UNIX, SOCK_STREAM) as broker:
                broker.settimeout(READ_S)
                broker.connect(self.record.key_socket)
                send(broker, request, timeout_s=READ_S)
                answer = receive(broker, idle_s=READ_S, read_s=READ_S)
        except OSError as error:
            raise KeyStoreUnavailable(f"The head's key broker does not answer ({error.strerror}).") from None
        if answer is None:
            raise KeyStoreUnavailable("The head's key broker closed the connection.")
        return answer

    def _connect_to(self, service: str, connection: ssl.SSLSocket, peer: Peer) -> None:
        """Connect a node to Ray's dashboard, which asks for Ray's token, or to the job service, which checks tokens."""
        try:
            self._require_node(peer)
            local_end = self._open_dashboard() if service == DASHBOARD else self._open_job_service()
        except FalajError as error:
            send(connection, error_to_plain(error), timeout_s=READ_S)
            return
        except OSError as error:
            answer = error_to_plain(KeyStoreUnavailable(f"The {service} does not answer: {error.strerror}."))
            send(connection, answer, timeout_s=READ_S)
            return
        with local_end:
            if service == DASHBOARD:
                require_own_peer(local_end, owner=self.record.owner)
            send(connection, {"ok": True, "result": None}, timeout_s=READ_S)
            splice(connection, local_end)

    def _open_dashboard(self) -> socket.socket:
        address = urlsplit(self.record.dashboard_url)
        return socket.create_connection((address.hostname or "", address.port or 0), timeout=READ_S)

    def _open_job_service(self) -> socket.socket:
        opened = socket.socket(AF_UNIX, SOCK_STREAM)
        opened.settimeout(READ_S)
        try:
            opened.connect(self.record.jobs_socket)
        except OSError:
            opened.close()
            raise
        return opened


def _states(parts: object) -> dict[str, str]:
    """Return the states of parts in a node's report. All readers of `cluster.status` get them, so they are short words.

    Raises:
        InvalidRequest: it has other content.
    """
    if not isinstance(parts, dict) or len(parts) > MAX_PARTS:
        raise InvalidRequest(f"A report has the states of at most {MAX_PARTS} parts.")
    for text in (*parts, *parts.values()):
        if not isinstance(text, str) or not _WORDS.fullmatch(text):
            raise InvalidRequest("A report has names of parts and their states only.")
    return parts
