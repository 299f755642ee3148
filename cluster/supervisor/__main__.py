"""`python -m cluster.supervisor`: watch a cluster on this machine. `cluster.up` starts it, and `cluster.down` ends it.

Each cluster has one supervisor. A lock prevents the start of a second supervisor.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.host import processes
from cluster.host.signals import set_on_signal
from cluster.ledger import open_ledger
from cluster.ledger.events import ProcessRestarted
from cluster.membership.departure import has_ended, remove_membership
from cluster.metrics import new_registry, serve_metrics
from cluster.node.launch import remove_folders
from cluster.node.locks import supervisor_lock
from cluster.node.parts import expected_parts
from cluster.node.scheduling import wait_for_turn
from cluster.security.private_folder import ensure_private_folder
from cluster.session import ClusterRecord, find_record, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.supervisor import head
from cluster.supervisor.machine import JoinedNode, Reporter, ThisMachine
from cluster.supervisor.metrics import SupervisorMetrics
from cluster.supervisor.renewal import Renewal
from cluster.supervisor.watch import Supervisor

EVERY_S = 1.0
REPORT_EVERY_S = 5.0
ASK_EVERY_S = 30.0
LOG = logging.getLogger("falaj.supervisor")


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Watch the cluster until SIGTERM, or until the storage root's record names another cluster or no cluster."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    wait_for_turn()
    record, stopped, registry = require_recorded_cluster(config), threading.Event(), new_registry()
    folder = ensure_private_folder(Path(record.runtime_folder))
    machine = ThisMachine(config, record) if record.node_id is None else JoinedNode(config, record)
    supervisor = Supervisor(
        machine,
        record_restart=restart_recorder(config, record),
        metrics=SupervisorMetrics(registry),
        parts=expected_parts(record),
    )
    set_on_signal([signal.SIGTERM], stopped)
    membership = None
    if isinstance(machine, JoinedNode):
        reporter = Reporter(
            machine, states=lambda: supervisor.states, stopped=stopped, every_s=REPORT_EVERY_S
        )
        membership = Membership(config, record, reporter)
    signal.signal(signal.SIGHUP, lambda *_: supervisor.retry_now())
    with supervisor_lock(config.storage), protected_from_cleanup(folder):
        serve_metrics(registry, port=record.ports.get("supervisor_metrics"))
        Renewal(machine.renew_certificates, stopped=stopped).start()
        while not stopped.wait(EVERY_S):
            try:
                if not is_recorded(config, record):
                    LOG.warning("cluster %s is no longer recorded; its supervisor ends", record.cluster_id)
                    break
                if membership is not None and membership.has_ended():
                    LOG.warning("this node is no member of the cluster any more; its processes end")
                    processes.end(record.instance, owner=record.owner)
                    remove_folders(record)
                    remove_membership(record)
                    break
                supervisor.check_once()
            except Exception:
                LOG.exception("a check of the cluster failed; the next one is in %.0f s", EVERY_S)
    processes.exit_at_once()  # a thread may start a head, or write to the ledger


class Membership:
    """Finds out when this node is no member any more.

    While the head does not answer, the ledger says whether it was stopped for good.
    """

    def __init__(self, config: PlatformConfig, record: ClusterRecord, reporter: Reporter) -> None:
        self._config = config
        self._record = record
        self._reporter = reporter
        reporter.start()
        self._asked_at = 0.0

    def has_ended(self) -> bool:
        """Return whether the ledger says that the node has left or that the cluster was stopped."""
        now = time.monotonic()
        if not self._reporter.refused.is_set() or now < self._asked_at + ASK_EVERY_S:
            return False
        self._asked_at = now
        try:
            return has_ended(open_ledger(self._config), self._record)
        except sa.exc.SQLAlchemyError:
            return False


def is_recorded(config: PlatformConfig, record: ClusterRecord) -> bool:
    """Return whether the storage root's record still names this cluster, or is damaged."""
    try:
        current = find_record(config.storage)
    except ConfigError:
        return True
    return current is not None and current.cluster_id == record.cluster_id


@contextlib.contextmanager
def protected_from_cleanup(folder: Path) -> Iterator[None]:
    """Lock a folder below /tmp, so that systemd-tmpfiles does not remove it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def restart_recorder(config: PlatformConfig, record: ClusterRecord) -> Callable[[str, str, int], None]:
    """Return a function that records restarts in the ledger.

    The function writes in a background thread, so that a ledger that does not answer cannot delay a restart.
    """
    writer = ThreadPoolExecutor(1, "ledger")

    def write(process: str, reason: str, attempt: int) -> None:
        event = ProcessRestarted(
            cluster_id=record.cluster_id,
            process=process if record.node_id is None else f"{process} of node {record.node_id}",
            reason=reason,
            attempt=attempt,
        )
        try:
            open_ledger(config).append(event, actor=head.ACTOR)
        except Exception as error:  # noqa: BLE001 (the disk may be full, or the database down)
            LOG.error("the restart of %s could not be recorded: %s", process, error)

    def submit(process: str, reason: str, attempt: int) -> None:
        writer.submit(write, process, reason, attempt)

    return submit


if __name__ == "__main__":
    main()
