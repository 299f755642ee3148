"""`python -m cluster.supervisor`: watch a cluster on this machine. `cluster.up` starts it, and `cluster.down` ends it.

Each cluster has one supervisor. A lock prevents the start of a second supervisor.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.ledger.events import ProcessRestarted
from cluster.metrics import serve_metrics
from cluster.node.launch import (
    edge_log,
    environment,
    key_log,
    start_process,
    supervisor_log,
    uploader_log,
)
from cluster.node.locks import supervisor_lock
from cluster.node.parts import (
    BROKER,
    EDGE,
    RAY_PARTS,
    UPLOADER,
    Part,
    State,
    find_parts,
    needed_parts,
    probe_state,
)
from cluster.node.scheduling import wait_for_turn
from cluster.security.private_folder import ensure_private_folder
from cluster.session import ClusterRecord, find_record, require_recorded_cluster
from cluster.settings import PlatformConfig
from cluster.signals import set_on_signal
from cluster.supervisor import daemons, head
from cluster.supervisor.metrics import SupervisorMetrics
from cluster.supervisor.watch import Supervisor

EVERY_S = 1.0
LOG = logging.getLogger("falaj.supervisor")


class ThisMachine:
    """The supervisor's operations on this machine; see `watch.Machine`."""

    def __init__(self, config: PlatformConfig, record: ClusterRecord) -> None:
        self._config = config
        self._record = record

    def find(self) -> dict[Part, psutil.Process]:
        return find_parts(self._record)

    def answers(self, part: Part) -> bool:
        # Only the broker is probed. HAProxy's controller watches HAProxy, and a connection to the GCS would only show
        # that its port is open.
        return part is not Part.broker or probe_state(part, State.running, self._record) is State.running

    def start(self, part: Part) -> bool:
        config, record = self._config, self._record
        if part is Part.broker:
            start_process(config, record, BROKER, log=key_log(config))
        elif part is Part.uploader:
            start_process(config, record, UPLOADER, log=uploader_log(config))
        elif part is Part.edge:
            start_process(config, record, EDGE, log=edge_log(config))
        elif part in RAY_PARTS:
            return daemons.restart_daemon(
                record, part, environment(config, record), log=supervisor_log(config)
            )
        return part is not Part.haproxy  # the edge controller restarts it

    def kill(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(5.0)

    def resume(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()

    def restore_is_due(self) -> bool:
        return head.restore_is_due(self._record)

    def replace_head(self) -> None:
        head.replace_head(self._config, self._record)

    def restore(self) -> None:
        head.restore(self._config, self._record)


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Watch the cluster until SIGTERM, or until the storage root's record names another cluster or no cluster."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    wait_for_turn()
    record, stopped, registry = require_recorded_cluster(config), threading.Event(), CollectorRegistry()
    folder = ensure_private_folder(Path(record.runtime_folder))
    supervisor = Supervisor(
        ThisMachine(config, record),
        record_restart=restart_recorder(config, record),
        metrics=SupervisorMetrics(registry),
        parts=needed_parts(record),
    )
    set_on_signal([signal.SIGTERM], stopped)
    signal.signal(signal.SIGHUP, lambda *_: supervisor.retry_now())
    with supervisor_lock(config.storage), protected_from_cleanup(folder):
        serve_metrics(registry, port=record.ports.get("supervisor_metrics"))
        while not stopped.wait(EVERY_S):
            try:
                if not is_recorded(config, record):
                    LOG.warning("cluster %s is no longer recorded; its supervisor ends", record.cluster_id)
                    break
                supervisor.check_once()
            except Exception:
                LOG.exception("a check of the cluster failed; the next one is in %.0f s", EVERY_S)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # do not wait for a thread that starts a head or writes to the ledger


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
            cluster_id=record.cluster_id, process=process, reason=reason, attempt=attempt
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
