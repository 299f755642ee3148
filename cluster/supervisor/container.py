"""`python -m cluster.supervisor.container [key=value …]`: run a cluster in the foreground, as a container's program.

It runs `cluster.up` with its own options. If the ledger lists deployed models, the supervisor then restores them, so a
container that was replaced serves again. SIGTERM ends the cluster like `cluster.down`, and this program exits 0. If the
supervisor dies, nothing else in a container would start it again, so this program does.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading

from cluster.entrypoint import job
from cluster.host.signals import set_on_signal
from cluster.ledger import open_ledger
from cluster.ledger.events import ModelDeployed
from cluster.node.locks import container_lock
from cluster.node.parts import Part, find_parts
from cluster.session import find_own_record
from cluster.settings import PlatformConfig
from cluster.supervisor.head import request_restore

CHECK_EVERY_S = 10.0
LOG = logging.getLogger("falaj.container")


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Run until SIGTERM or SIGINT. If the cluster does not start, exit with the exit code of `cluster.up`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options, stopped = sys.argv[1:], threading.Event()
    set_on_signal([signal.SIGTERM, signal.SIGINT], stopped)
    with container_lock(config.storage):
        code = run("cluster.up", *options)
        if code:
            sys.exit(code)
        restore_models(config)
        while not stopped.wait(CHECK_EVERY_S):
            if not supervisor_runs(config):
                LOG.error("the supervisor has died; starting it again")
                run("cluster.up", *options)
        code = run("cluster.down", *options)
    sys.exit(code)


def run(module: str, *options: str) -> int:
    """Run a command, and return its exit code.

    It gets a session of its own, so that a terminal's SIGINT reaches only this program.
    """
    return subprocess.run(
        [sys.executable, "-m", module, *options], check=False, start_new_session=True
    ).returncode


def restore_models(config: PlatformConfig) -> None:
    """Let the supervisor start the models that should serve according to the ledger."""
    record = find_own_record(config.storage)
    if record is not None and open_ledger(config).last(ModelDeployed) is not None:
        request_restore(record)


def supervisor_runs(config: PlatformConfig) -> bool:
    """Return whether the cluster's supervisor runs, or no cluster is recorded because `cluster.down` has ended it."""
    record = find_own_record(config.storage)
    return record is None or Part.supervisor in find_parts(record)


if __name__ == "__main__":
    main()
