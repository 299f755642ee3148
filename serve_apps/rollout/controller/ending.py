"""Ends the applications of versions that the controller has removed. It runs in a thread on the head.

Only a process of Ray can end an application. So a command does it, with the intent of the supervisor, which may start
what serves according to the ledger, and end what does not.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

from cluster.errors import first_line
from cluster.ledger import Ledger
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig
from serve_apps.rollout.serving_state import read_states
from serve_apps.rollout.warm import OpenRemovals

EVERY_S = 5.0
MAX_PAUSE_S = 300.0
COMMAND_S = 300.0
MODULE = "serve_apps.deploy"
LOG = logging.getLogger("falaj.rollouts")


class ApplicationEnder:
    """Runs a command while a removed application has not ended.

    Args:
        ledger: The ledger.
        command: Ends all such applications.
    """

    def __init__(self, ledger: Ledger, command: Callable[[], object]) -> None:
        self._ledger = ledger
        self._removals = OpenRemovals(ledger=ledger)
        self._command = command

    def run(self, stopped: threading.Event) -> None:
        """Look every few seconds until `stopped` is set. After a failure, wait longer each time."""
        pause_s = EVERY_S
        while not stopped.wait(pause_s):
            pause_s = EVERY_S if self.end_once() else min(2 * pause_s, MAX_PAUSE_S)

    def end_once(self) -> bool:
        """Run the command if it has something to do. Return whether it did not fail."""
        try:
            if next(self._removals.entries(lambda: read_states(self._ledger)), None) is not None:
                self._command()
        except Exception as error:  # noqa: BLE001 (any failure is tried again)
            LOG.warning("removed applications could not be ended: %s", first_line(error))
            return False
        return True


def end_command(config: PlatformConfig, record: ClusterRecord) -> Callable[[], object]:
    """Return a function that ends removed applications, in a process of its own."""
    from cluster.node.launch import cluster_overrides, run_command
    from cluster.supervisor.head import supervisor_intent

    def end() -> str:
        token = supervisor_intent(config, record)
        command = [
            *(sys.executable, "-m", MODULE, "action=end_removed"),
            *(f"++identity.token_file='{token}'", *cluster_overrides(config, record)),
        ]
        failure = "The applications of removed versions did not end"
        return run_command(command, config, record, failure=failure, timeout_s=COMMAND_S)

    return end
