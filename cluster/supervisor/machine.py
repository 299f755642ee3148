"""The supervisor's operations on a head and on a node that joined; see `watch.Machine`."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from cluster.errors import FalajError
from cluster.host import processes
from cluster.ledger import open_ledger
from cluster.membership.head_client import HeadClient
from cluster.membership.members import HEAD
from cluster.membership.renewal import renew_from_head, renewal_event
from cluster.node.certificates import ensure_certificates
from cluster.node.gcs_store import secret_environment
from cluster.node.launch import (
    edge_log,
    environment,
    jobs_log,
    key_log,
    nodes_log,
    rollouts_log,
    scheduler_log,
    start_process,
    start_ray_node,
    supervisor_log,
    uploader_log,
)
from cluster.node.parts import (
    BROKER,
    EDGE,
    JOBS,
    NODES,
    RAY_PARTS,
    RELAY,
    ROLLOUTS,
    SCHEDULER,
    UPLOADER,
    Part,
    State,
    find_parts,
    probe_state,
)
from cluster.security.private_folder import ensure_private_folder
from cluster.security.tls.certificates import EDGE_NAME, NODE_CERTIFICATE_NAME, require_authority
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from cluster.storage import local
from cluster.supervisor import daemons, head


class ThisMachine:
    """The head."""

    broker_module = BROKER

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
            start_process(config, record, self.broker_module, log=key_log(config))
        elif part is Part.nodes:
            start_process(config, record, NODES, log=nodes_log(config))
        elif part is Part.uploader:
            start_process(config, record, UPLOADER, log=uploader_log(config))
        elif part is Part.scheduler:
            start_process(config, record, SCHEDULER, log=scheduler_log(config))
        elif part is Part.jobs:
            start_process(config, record, JOBS, log=jobs_log(config))
        elif part is Part.rollouts:
            start_process(config, record, ROLLOUTS, log=rollouts_log(config))
        elif part is Part.edge:
            start_process(config, record, EDGE, log=edge_log(config))
        elif part in RAY_PARTS:
            variables = environment(config, record)
            if part is Part.gcs:
                variables |= secret_environment(config.cluster.gcs)
            return daemons.restart_daemon(record, part, variables, log=supervisor_log(config))
        return part is not Part.haproxy  # its controller restarts it

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

    def renew_certificates(self) -> bool:
        """Renew the certificates that are due, and return whether there are new ones. The ledger has the event.

        Raises:
            FalajError: the authority is missing, does not answer, or refuses.
            SQLAlchemyError: the ledger does not answer.
            OSError: a file cannot be read or written.
        """
        tls = local(self._record.layout.tls)
        require_authority(tls)
        before = tls_state(tls)
        ensure_certificates(self._config, self._record)
        if tls_state(tls) == before:
            return False
        event = renewal_event(self._record, HEAD, (tls / NODE_CERTIFICATE_NAME).read_bytes())
        open_ledger(self._config).append(event, actor=head.ACTOR)
        return True


class JoinedNode(ThisMachine):
    """A node that joined. Its Ray starts anew when the raylet is lost, or when the head has a new Ray session."""

    broker_module = RELAY

    def __init__(self, config: PlatformConfig, record: ClusterRecord) -> None:
        super().__init__(config, record)
        self._head = HeadClient.of(record)
        self._heads_session = ""

    def report(self, parts: dict[str, str]) -> None:
        """Tell the head the state of this node's parts.

        Raises:
            FalajError: the head does not answer, or does not know this node.
        """
        answer = self._head.request("report", parts=parts)
        if isinstance(answer, dict):
            self._heads_session = str(answer.get("session", ""))

    def restore_is_due(self) -> bool:
        # Ray's workers replace the link, so it is missing for moments. Then nothing is known.
        return len({self._heads_session, self._own_session()} - {""}) == 2

    def restore(self) -> None:
        if self.restore_is_due():
            self.replace_head()

    def replace_head(self) -> None:
        record = self._record
        ensure_private_folder(Path(record.runtime_folder))
        daemons.remove_commands(record)
        processes.end(record.instance, owner=record.owner, only=head.belongs_to_ray, grace_s=head.GRACE_S)
        shutil.rmtree(record.temp_dir, ignore_errors=True)
        start_ray_node(self._config, record)
        daemons.save_commands(record)

    def renew_certificates(self) -> bool:
        return renew_from_head(local(self._record.layout.tls), self._head)

    def _own_session(self) -> str:
        try:
            return Path(f"{self._record.temp_dir}/session_latest").readlink().name
        except OSError:
            return ""


def tls_state(tls: Path) -> list[bytes]:
    """Return the certificates of a head."""
    return [(tls / name).read_bytes() for name in (NODE_CERTIFICATE_NAME, EDGE_NAME)]


class Reporter(threading.Thread):
    """Reports the state of a node's parts to the head, every few seconds.

    Args:
        node: the node.
        states: returns the present state of each part.
        stopped: ends the thread.
        every_s: seconds between two reports.
    """

    def __init__(
        self,
        node: JoinedNode,
        *,
        states: Callable[[], Mapping[Part, State]],
        stopped: threading.Event,
        every_s: float,
    ) -> None:
        super().__init__(name="reports", daemon=True)
        self._node = node
        self._states = states
        self._stopped = stopped
        self._every_s = every_s
        self.refused = threading.Event()
        """Set while the head does not answer or does not know this node."""

    def run(self) -> None:
        while True:
            try:
                states = {Part.supervisor: State.running, **self._states()}
                self._node.report({part.value: state.value for part, state in states.items()})
                self.refused.clear()
            except (FalajError, OSError):
                self.refused.set()
            if self._stopped.wait(self._every_s):
                return
