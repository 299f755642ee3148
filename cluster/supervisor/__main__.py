"""`python -m cluster.supervisor`: watches a cluster on this machine; started by `cluster.up`, ended by `cluster.down`.

There is one for each cluster: a second one is refused by a lock.
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

from cluster import processes
from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.ledger.events import ProcessRestarted
from cluster.metrics import serve_metrics
from cluster.node.changing import sole_supervisor
from cluster.node.launch import edge_log, environment, key_log, start_process, supervisor_log
from cluster.node.parts import BROKER, EDGE, RAYS_OWN, Part, State, probed, sort_out
from cluster.node.scheduling import wait_for_turn
from cluster.security.private_folder import private_folder
from cluster.session import ClusterRecord, find_record, recorded
from cluster.settings import PlatformConfig
from cluster.supervisor import daemons, head
from cluster.supervisor.metrics import SupervisorMetrics
from cluster.supervisor.watch import Supervisor

EVERY_S = 1.0
LOG = logging.getLogger("falaj.supervisor")


class ThisMachine:
    """The machine that a cluster runs on."""

    def __init__(self, config: PlatformConfig, record: ClusterRecord) -> None:
        self._config = config
        self._record = record

    def find(self) -> dict[Part, psutil.Process]:
        return sort_out(processes.find(self._record.cluster_id, owner=self._record.owner))

    def answers(self, part: Part) -> bool:
        # HAProxy has its controller to look after it, and a connection to the GCS would only say that its port is open.
        return part is not Part.broker or probed(part, State.running, self._record) is State.running

    def start(self, part: Part) -> bool:
        config, record = self._config, self._record
        if part is Part.broker:
            start_process(config, record, BROKER, log=key_log(config))
        elif part is Part.edge:
            start_process(config, record, EDGE, log=edge_log(config))
        elif part in RAYS_OWN:
            return daemons.start_again(record, part, environment(config, record), log=supervisor_log(config))
        return part is not Part.haproxy  # its controller starts it, when it has ended

    def kill(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(5.0)

    def resume(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()

    def restore_is_due(self) -> bool:
        return head.restore_is_due(self._record)

    def bring_back(self) -> None:
        head.bring_back(self._config, self._record)

    def restore(self) -> None:
        head.restore(self._config, self._record)


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Watch until SIGTERM, or until the cluster is no longer the one that is recorded."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    wait_for_turn()
    record, stopped, registry = recorded(config), threading.Event(), CollectorRegistry()
    folder = private_folder(Path(record.runtime_folder))
    supervisor = Supervisor(
        ThisMachine(config, record),
        note=in_background(config, record),
        metrics=SupervisorMetrics(registry),
    )
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGHUP, lambda *_: supervisor.try_at_once())
    with sole_supervisor(config.storage), kept_from_cleaners(folder):
        serve_metrics(registry, port=record.ports.get("supervisor_metrics"))
        while not stopped.wait(EVERY_S):
            try:
                if not is_recorded(config, record):
                    LOG.warning("cluster %s is no longer recorded; its supervisor ends", record.cluster_id)
                    break
                supervisor.turn()
            except Exception:
                LOG.exception("a look at the cluster failed; the next one is in %.0f s", EVERY_S)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # a thread may wait for a head to start, or for the ledger: nobody waits for it here


def is_recorded(config: PlatformConfig, record: ClusterRecord) -> bool:
    """Whether the cluster is the one that its storage root's record names; a damaged record names no other."""
    try:
        now = find_record(config.storage)
    except ConfigError:
        return True
    return now is not None and now.cluster_id == record.cluster_id


@contextlib.contextmanager
def kept_from_cleaners(folder: Path) -> Iterator[None]:
    """Have what removes old files from /tmp leave a folder alone: systemd-tmpfiles passes over one that is locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def in_background(config: PlatformConfig, record: ClusterRecord) -> Callable[[str, str, int], None]:
    """Records restarts in the ledger in a thread: a ledger that does not answer holds up no restart."""
    writer = ThreadPoolExecutor(1, "ledger")

    def write(process: str, reason: str, attempt: int) -> None:
        event = ProcessRestarted(
            cluster_id=record.cluster_id, process=process, reason=reason, attempt=attempt
        )
        try:
            open_ledger(config).append(event, actor=head.ACTOR)
        except Exception as error:  # noqa: BLE001 (a full disk, a database that is down)
            LOG.error("the restart of %s could not be recorded: %s", process, error)

    def note(process: str, reason: str, attempt: int) -> None:
        writer.submit(write, process, reason, attempt)

    return note


if __name__ == "__main__":
    main()
