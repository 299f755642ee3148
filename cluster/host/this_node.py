"""What a process knows of the node that it runs on.

Jobs send their configuration and paths to processes on other nodes. There, the folder of the node's own state and the
key broker's socket are different ones. Every process of a cluster has the path of its node's record in its environment
(`FALAJ_CLUSTER_RECORD`). On a cluster with one node nothing is replaced. In a command's own process, `storage.local` on
the command line wins.
"""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path

RECORD_VARIABLE = "FALAJ_CLUSTER_RECORD"
LOOPBACK_ADDRESS = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ThisNode:
    """The node of a cluster of several nodes, from its record."""

    cluster_id: str
    storage_root: str
    local_root: str
    """`storage.local` of this node."""
    key_socket: str
    is_head: bool


def this_node(*, cluster_id: str = "", storage_root: str = "") -> ThisNode | None:
    """Return the node that this process runs on, or None if the cluster has one node or is another one.

    Args:
        cluster_id: only a node of this cluster.
        storage_root: only a node of the cluster with this `storage.root`.
    """
    path = os.environ.get(RECORD_VARIABLE)
    if not path:
        return None
    try:
        record = json.loads(Path(path).read_text())
        if is_loopback(record.get("address", LOOPBACK_ADDRESS)):
            return None
        node = ThisNode(
            cluster_id=record["cluster_id"],
            storage_root=record["storage_root"],
            local_root=record["local_root"] or record["storage_root"],
            key_socket=record["key_socket"],
            is_head=record["node_id"] is None,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    matches = cluster_id in ("", node.cluster_id) and storage_root in ("", node.storage_root)
    return node if matches else None


def forget_node(*, unless_at: str | None = None) -> None:
    """Remove the record of a running node from this process's environment.

    `cluster.up` and `cluster.join` do this first, and every command whose command line names another `storage.local`.
    Otherwise that node's folders would replace the new ones, if both have the same `storage.root`.

    Args:
        unless_at: leave the record of a node whose own folder is this one.
    """
    if unless_at is not None:
        node = this_node()
        if node is None or node.local_root == unless_at:
            return
    os.environ.pop(RECORD_VARIABLE, None)


def is_loopback(address: str) -> bool:
    """Return whether an address is loopback.

    Raises:
        ValueError: It is not an IPv4 address of one machine.
    """
    try:
        parsed = ipaddress.IPv4Address(address)
    except ValueError:
        parsed = ipaddress.IPv4Address(0)
    if parsed.is_unspecified or parsed.is_multicast:
        raise ValueError(f"cluster.address must be an IPv4 address such as 10.0.0.1, got '{address}'.")
    return parsed.is_loopback
