"""`python -m cluster.supervisor.container [key=value …]`: run a cluster in the foreground, as a container's program.

It runs `cluster.up` with its own options. The supervisor then starts the models that the ledger lists as serving, so a
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
from cluster.node.locks import container_lock
from cluster.node.parts import Part, find_parts
from cluster.session import find_own_record
from cluster.settings import PlatformConfig

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


def supervisor_runs(config: PlatformConfig) -> bool:
    """Return whether the cluster's supervisor runs, or no cluster is recorded because `cluster.down` has ended it."""
    record = find_own_record(config.storage)
    return record is None or Part.supervisor in find_parts(record)


if __name__ == "__main__":
    main()
