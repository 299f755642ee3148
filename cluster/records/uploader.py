"""`python -m cluster.records.uploader`: upload this node's closed segments, every few seconds, until SIGTERM.

`cluster.up` starts it if the storage root is remote, and the supervisor restarts it. It needs the ledger's database and
the object store, and no key. While one of them does not answer, segments stay on the disk.
"""

from __future__ import annotations

import logging
import signal
import threading

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.records.upload import Uploader
from cluster.settings import PlatformConfig
from cluster.signals import set_on_signal
from cluster.storage import layout

EVERY_S = 5.0
LOG = logging.getLogger("falaj.uploader")


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Upload until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    places, stopped = layout(config.storage), threading.Event()
    if places.shared is None:
        raise ConfigError(
            f"storage.root {places.root} is on this machine, so no log is uploaded. Set storage=s3 and storage.root."
        )
    set_on_signal([signal.SIGTERM], stopped)
    uploader = Uploader(places, open_ledger(config))
    LOG.info("node %s uploads its logs to %s", uploader.node, places.shared)
    while True:
        try:
            uploader.run_once()
        except Exception as error:  # noqa: BLE001 (the database or the disk; the next round tries again)
            LOG.warning("the logs were not uploaded: %s", error)
        if stopped.wait(EVERY_S):
            return


if __name__ == "__main__":
    main()
