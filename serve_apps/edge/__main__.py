"""`python -m serve_apps.edge`: run the edge of this machine. `cluster.up` starts it; SIGTERM stops it.

To restart it, start it again.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa

from cluster.entrypoint import job
from cluster.host.processes import ID_VARIABLE
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.metrics import new_registry, serve_metrics
from cluster.node.edge_address import edge_hosts
from cluster.node.edge_leaving import ADMIN_SOCKET
from cluster.node.scheduling import wait_for_turn
from cluster.security.edge_proof import edge_proof
from cluster.security.recorded_settings import apply_cluster_record
from cluster.security.tls.certificates import EDGE_NAME
from cluster.security.tokens.trust import Trust, access_rules
from cluster.session import ClusterRecord, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout, local
from serve_apps.edge.control.controller import Controller
from serve_apps.edge.control.edge_state import state_file
from serve_apps.edge.control.haproxy_process import HAProxy
from serve_apps.edge.control.journaled import FollowedJournal
from serve_apps.edge.control.live_edges import edge_id
from serve_apps.edge.control.metrics import EdgeMetrics
from serve_apps.edge.control.succession import SIGNAL, sole_controller
from serve_apps.edge.haproxy.config import EdgeSettings
from serve_apps.edge.haproxy.dashboard import TOKEN_VARIABLE
from serve_apps.edge.haproxy.keys import key_writer
from serve_apps.edge.haproxy.request_limits import Limit, Limits
from serve_apps.replica.edge_headers import edge_variables
from serve_apps.replica.targets import serve_targets
from serve_apps.rollout.evidence.access_files import Rotation
from serve_apps.rollout.evidence.collecting import Collector, Reader
from serve_apps.rollout.outage.journal import journal_of

LEDGER_RETRY_S = 1.0
JOURNAL_INTERVAL_S = 0.1
KEYS_MAX_AGE_S = 30.0
"""Maximum age of an OIDC issuer's keys. Other processes fetch the keys again when a token names an unknown key, but
HAProxy cannot."""


@dataclass(kw_only=True, slots=True)
class LimitConfig:
    """Limits of one principal or tenant; see `Limit`."""

    requests_per_s: int = 10_000
    concurrent: int = 384
    """The default for principals is below `max_connections_of_one_address`. So a client that opens a connection for
    each request gets 429, and no closed connection, if its requests become slow."""

    def __post_init__(self) -> None:
        self.limit()

    def limit(self) -> Limit:
        """Return the validated limit."""
        return Limit(requests_per_s=self.requests_per_s, concurrent=self.concurrent)


@dataclass(kw_only=True, slots=True)
class LimitsConfig:
    """Limits of each principal and tenant for which `serve_apps.edge.limits` has set no others."""

    principal: LimitConfig = field(default_factory=LimitConfig)
    tenant: LimitConfig = field(default_factory=lambda: LimitConfig(requests_per_s=50_000, concurrent=1_500))


@dataclass(kw_only=True, slots=True)
class AccessConfig:
    """Files of access records."""

    max_mb: float = 256.0
    """Size in MB after which a new file begins."""
    max_age_h: float = 24.0
    """Age in hours after which a new file begins."""
    retention_days: float = 30.0
    """Days from a file's last record to its removal. A file that was not counted yet is never removed."""

    def __post_init__(self) -> None:
        for name in ("max_mb", "max_age_h", "retention_days"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"access.{name} must be above 0, got {getattr(self, name)}.")

    def rotation(self) -> Rotation:
        """Return the limits in bytes and seconds."""
        return Rotation(
            max_bytes=round(self.max_mb * 1e6),
            max_age_s=self.max_age_h * 3600,
            retention_s=self.retention_days * 86_400,
        )


@dataclass(kw_only=True, slots=True)
class EdgeConfig(PlatformConfig):
    """Settings of the edge."""

    max_body_bytes: int = 32_000_000
    """A larger body ends the connection. The limit of replicas is much lower; they read the body and then refuse it."""
    threads: int = 1
    """Threads of HAProxy. A request takes 140 µs of one core. Use several threads only if access records may be lost:
    when two threads write at the same time, one line is dropped (two threads at full load: 17 of 20,156 lines)."""
    max_connections: int = 2000
    max_connections_of_one_address: int = 500
    """Behind a proxy, set this to `max_connections`, because all connections then have the proxy's address."""
    hang_s: float = 0.7
    """If a treatment's replica does not answer a health check for this many seconds, the champion answers instead. The
    value must be larger than the time of the longest prediction, because a replica answers one request at a time."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    wake_timeout_s: float = 60.0
    """How long a request waits for a replica, if a version is scaled to zero or a champion has no replica."""


def settings(config: EdgeConfig, record: ClusterRecord) -> EdgeSettings:
    """Return HAProxy's files, addresses and limits."""
    places = layout(config.storage)
    edge = local(places.edge)
    return EdgeSettings(
        bind=",".join(bind_address(host, record.ports["edge"]) for host in edge_hosts(config.cluster)),
        metrics_bind=f"127.0.0.1:{record.ports['edge_metrics']}",
        certificate=f"{places.tls}/{EDGE_NAME}",
        authority_folder=places.tls,
        dashboard=urlsplit(record.dashboard_url).netloc,
        jobs_socket=record.jobs_socket,
        rollouts_socket=record.rollouts_socket,
        tokens=access_rules(config.identity.issuer),
        role_claim=config.identity.issuer.role_claim,
        tenant_claim=config.identity.issuer.tenant_claim,
        scope_claim=config.identity.issuer.scope_claim,
        map_file=str(edge / "routes.map"),
        error_folder=str(edge / "errors"),
        admin_socket=f"{record.runtime_folder}/{ADMIN_SOCKET}",
        limits=Limits(
            principal=config.limits.principal.limit(),
            tenant=config.limits.tenant.limit(),
            folder=str(edge),
            socket=f"{record.runtime_folder}/peers.sock",
        ),
        max_body_bytes=config.max_body_bytes,
        threads=config.threads,
        max_connections=config.max_connections,
        max_connections_of_one_address=config.max_connections_of_one_address,
        hang_ms=round(config.hang_s * 1000),
        wake_timeout_s=config.wake_timeout_s,
        serve_proxy=serve_proxy(record),
    )


def bind_address(host: str, port: int) -> str:
    """Return an address to listen on, as HAProxy takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve_proxy(record: ClusterRecord) -> str:
    """Return the address of Serve's proxy, or "" if there is none. It runs on the head, and listens on its address."""
    port = urlsplit(record.serve_http_url).port
    return "" if port is None else f"{urlsplit(f'//{record.ray_address}').hostname}:{port}"


@job("edge", EdgeConfig)
def main(config: EdgeConfig) -> None:
    """Run until SIGTERM, or until a second edge is started. The second edge takes over without refusing a request."""
    logging.basicConfig(level=logging.INFO)
    wait_for_turn()
    record = require_recorded_cluster(config)
    restart_as_part_of(record)
    apply_cluster_record(record, config)
    places = layout(config.storage)
    edge = local(places.edge)
    edge_settings = settings(config, record)
    haproxy = HAProxy(
        config=edge / "haproxy.cfg",
        admin_socket=Path(edge_settings.admin_socket),
        access_folder=edge / "access",
        rotation=config.access.rotation(),
        secrets={
            TOKEN_VARIABLE: Path(record.token_path).read_text().strip(),
            **edge_variables(edge_proof(places)),
        },
    )
    stopped, handed_over = threading.Event(), threading.Event()

    set_on_signal([signal.SIGTERM], stopped)
    set_on_signal([SIGNAL], handed_over, stopped)
    with sole_controller(edge / "controller.lock"):
        registry = new_registry()
        metrics = EdgeMetrics(registry)
        serve_metrics(registry, port=record.ports.get("edge_controller_metrics"))
        journal = journal_of(places)
        follow = functools.partial(FollowedJournal(journal).apply_to_map, edge / "routes.map", haproxy)
        ledger = wait_for_ledger(config, haproxy, stopped, handed_over, follow)
        trust = Trust.of(config.identity.issuer, places, keys_max_age_s=KEYS_MAX_AGE_S)
        controller = Controller(
            ledger=ledger,
            fetch_targets=serve_targets(record),
            fetch_keys=key_writer(trust.keys, edge / "keys"),
            haproxy=haproxy,
            settings=edge_settings,
            state_file=state_file(config),
            journal=journal,
            address=f"https://{edge_settings.bind.split(',')[0]} on {socket.gethostname()}",
            metrics=metrics,
        )
        reader = Reader(ledger.engine, edge / "access", edge=edge_id(edge), rotation=config.access.rotation())
        with Collector(reader, on_collected=metrics.count).running():
            controller.run(stopped, handed_over=handed_over)


def restart_as_part_of(record: ClusterRecord) -> None:
    """Execute this program again with the cluster's id in the environment, if `cluster.up` did not start it.

    `cluster.down` uses this id to find the processes that it stops.
    """
    if os.environ.get(ID_VARIABLE) != record.instance:
        os.environ[ID_VARIABLE] = record.instance
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program


def wait_for_ledger(
    config: EdgeConfig,
    haproxy: HAProxy,
    stopped: threading.Event,
    handed_over: threading.Event,
    follow_journal: Callable[[], None],
) -> Ledger:
    """Open the ledger. While the ledger's database is down, HAProxy serves with the configuration on disk.

    A try can take half a minute. Meanwhile the edge follows this machine's journal of rollbacks.

    Raises:
        SQLAlchemyError: `stopped` was set while the database was down. If another edge takes over, HAProxy continues to
            serve.
    """
    while True:
        try:
            with ThreadPoolExecutor(1, "opening") as executor:
                opening = executor.submit(open_ledger, config)
                while wait([opening], timeout=JOURNAL_INTERVAL_S).not_done:
                    try_to_follow(follow_journal)
            return opening.result()
        except sa.exc.SQLAlchemyError as error:
            logging.warning(
                "the ledger cannot be opened, so the edge serves its last configuration: %s", error
            )
            haproxy.serve_last()
            try_to_follow(follow_journal)
            if stopped.wait(LEDGER_RETRY_S):
                if not handed_over.is_set():
                    haproxy.stop()
                raise


def try_to_follow(follow_journal: Callable[[], None]) -> None:
    """Follow the journal of rollbacks. After a failure the next call tries again."""
    try:
        follow_journal()
    except OSError as error:
        logging.warning("a rollback of the journal cannot be applied: %s", error)


if __name__ == "__main__":
    main()
