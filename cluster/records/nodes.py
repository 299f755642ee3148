"""`python -m cluster.records.nodes`: show until when each node's logs are complete; `forget=NODE` removes a lost node.

With `wait_s=180` the command waits until all nodes have shared the records that were written before it started. A
command that then reads a log reads all of these records.

A node that is lost with its disk never reports again, so the logs would count as incomplete for ever. After
`forget=NODE`, the other nodes upload what the ledger's database has of its segments. Records that were only on its disk
are lost.
"""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.entrypoint import job
from cluster.errors import ConfigError, Inconsistent, did_you_mean
from cluster.ledger import open_ledger
from cluster.records.blocks import SILENT_S
from cluster.records.database import ensure_tables
from cluster.records.progress import ALL_LOGS, NodeProgress, forget, read_progress
from cluster.settings import PlatformConfig

POLL_S = 1.0


@dataclass(kw_only=True, slots=True)
class LogNodesConfig(PlatformConfig):
    """Configuration of the command."""

    forget: str | None = None
    """Name of a lost node."""
    wait_s: float = 0.0
    """Seconds to wait until the logs of all nodes are complete; 0 does not wait."""

    def __post_init__(self) -> None:
        if self.wait_s < 0:
            raise ValueError(f"wait_s must not be negative, got {self.wait_s}.")


@job("log_nodes", LogNodesConfig)
def main(config: LogNodesConfig) -> None:
    """Show the nodes, or remove one."""
    ledger = open_ledger(config)
    ensure_tables(ledger)
    nodes = read_progress(ledger.engine)
    if config.forget is not None:
        require_silent(config.forget, nodes)
        forget(ledger.engine, config.forget)
        print(
            f"{config.forget} no longer counts; segments of it in the database are uploaded by another node"
        )
        return
    if config.wait_s:
        nodes = wait_until_complete(ledger.engine, timeout_s=config.wait_s)
    for node in nodes:
        print(describe(node))
    if not nodes:
        print(
            "no node reports: only logs below a remote storage root, with a ledger in PostgreSQL, have several"
        )


def wait_until_complete(engine: sa.Engine, *, timeout_s: float) -> list[NodeProgress]:
    """Wait until all nodes have shared every record that was written before now, and return their progress.

    Raises:
        Inconsistent: A node did not share its records in time.
    """
    began, deadline = dt.datetime.now(dt.UTC), time.monotonic() + timeout_s
    while True:
        nodes = read_progress(engine)
        late = [node for node in nodes if not node.is_complete(began)]
        if not late:
            return nodes
        if time.monotonic() > deadline:
            raise Inconsistent(
                f"After {timeout_s:.0f} s these nodes had not shared all records from before {began:%H:%M:%S} UTC: "
                f"{'; '.join(map(describe, late))}. If a node is lost with its disk, run `python -m "
                "cluster.records.nodes forget=NODE`."
            )
        time.sleep(POLL_S)


def require_silent(name: str, nodes: list[NodeProgress]) -> None:
    """Require that a node exists and does not report any more.

    Raises:
        ConfigError: The node is unknown, or it reports.
    """
    by_name = {node.node: node for node in nodes}
    if name not in by_name:
        raise ConfigError(f"No node '{name}' reports about its logs.{did_you_mean(name, by_name)}")
    if (silent_s := by_name[name].silent_s) < SILENT_S:
        raise ConfigError(
            f"Node '{name}' reported {silent_s:.0f} s ago, so its disk is not lost. Stop it, and wait {SILENT_S:.0f} s."
        )


def describe(node: NodeProgress) -> str:
    """Describe a node in one line."""
    logs = [f"{log or 'other logs'} until {until}" for log, until in sorted(node.until.items(), reverse=True)]
    if list(node.until) == [ALL_LOGS]:
        logs = [f"all logs until {node.until[ALL_LOGS]}"]
    return f"{node.node}: {', '.join(logs)}; reported {node.silent_s:.0f} s ago"


if __name__ == "__main__":
    main()
