"""`python -m cluster.membership`: the head's service for nodes. Started by `cluster.up`, stopped by SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

from cluster.entrypoint import job
from cluster.host.signals import set_on_signal
from cluster.ledger import open_ledger
from cluster.membership.members import Members
from cluster.membership.metrics import NodeMetrics
from cluster.membership.service import NodeService
from cluster.membership.transport import Server
from cluster.metrics import new_registry, serve_metrics
from cluster.session import require_recorded_cluster
from cluster.settings import PlatformConfig


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    record, stopped = require_recorded_cluster(config), threading.Event()
    ledger = open_ledger(config)
    members = Members(ledger, record.cluster_id)
    registry = new_registry()
    metrics = NodeMetrics(registry)
    service = NodeService(config=config, record=record, ledger=ledger, members=members, metrics=metrics)
    set_on_signal([signal.SIGTERM], stopped)
    threading.Thread(target=members.follow, args=(stopped,), name="members", daemon=True).start()
    address = (record.address, record.ports["nodes"])
    serve_metrics(registry, port=record.ports.get("nodes_metrics"))
    Server(address, tls=Path(record.layout.tls), serve=service.serve, metrics=metrics).run(stopped)


if __name__ == "__main__":
    main()
