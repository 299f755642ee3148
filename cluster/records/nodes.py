"""`python -m cluster.records.nodes`: show until when each node's logs are complete; `forget=NODE` removes a lost node.

A node that is lost with its disk never reports again, so the logs would count as incomplete for ever. After
`forget=NODE`, the other nodes upload what the ledger's database has of its segments. Records that were only on its disk
are lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ConfigError, did_you_mean
from cluster.ledger import open_ledger
from cluster.records.blocks import SILENT_S
from cluster.records.database import ensure_tables
from cluster.records.progress import ALL_LOGS, NodeProgress, forget, read_progress
from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class LogNodesConfig(PlatformConfig):
    """Configuration of the command."""

    forget: str | None = None
    """Name of a lost node."""


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
    for node in nodes:
        print(describe(node))
    if not nodes:
        print(
            "no node reports: only logs below a remote storage root, with a ledger in PostgreSQL, have several"
        )


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
