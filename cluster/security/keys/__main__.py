"""`python -m cluster.security.keys`: the key broker of this machine. `cluster.up` starts it, and SIGTERM stops it."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

from cluster.entrypoint import job
from cluster.host.signals import set_on_signal
from cluster.ledger import open_ledger
from cluster.metrics import new_registry, serve_metrics
from cluster.security.keys.broker import Broker
from cluster.security.keys.guarded import guarded_store
from cluster.security.keys.metrics import BrokerMetrics
from cluster.session import require_recorded_cluster
from cluster.settings import PlatformConfig


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Serve the configured key store until SIGTERM."""
    logging.basicConfig(level=logging.INFO)
    # The broker also starts if the head does not answer, because replicas need their keys.
    record = require_recorded_cluster(config)
    stopped, registry = threading.Event(), new_registry()
    serve_metrics(registry, port=record.ports.get("broker_metrics"))
    with guarded_store(config, open_ledger(config), stopped=stopped) as gate:
        broker = Broker(gate, Path(record.key_socket), metrics=BrokerMetrics(registry))
        set_on_signal([signal.SIGTERM], stopped)
        broker.run(stopped)


if __name__ == "__main__":
    main()
