"""The other nodes of the cluster, and what is dead of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cluster.entrypoint import compose_platform
from cluster.errors import FalajError
from cluster.ledger import open_ledger
from cluster.membership.head_client import HeadClient
from cluster.membership.members import HEAD, current_members
from cluster.node.parts import NodeStatus, Part, State
from cluster.session import ClusterRecord


def node_statuses(record: ClusterRecord) -> list[NodeStatus]:
    """Return the state of every other node, as the head knows it from their reports.

    If the head does not answer, the ledger says which nodes there are, and their state is not known.
    """
    try:
        reported = HeadClient.of(record).request("nodes")
    except (FalajError, OSError) as error:
        return _unknown(record, str(error))
    nodes = reported if isinstance(reported, list) else []
    others = [status_of(node) for node in nodes if node["node_id"] != record.node_id]
    return others if record.node_id is None else [_head(record, State.running, "running"), *others]


def status_of(node: Mapping[str, Any]) -> NodeStatus:
    """Return the state of a node from the head's answer."""
    down = [
        f"{part} ({state})"
        for part, state in node["parts"].items()
        if state != State.running and part in list(Part) and state in list(State)
    ]
    if not node["alive"]:
        silent = "no report" if node["silent_s"] is None else f"no report for {node['silent_s']} s"
        state, text = State.dead, f"dead: {silent}"
    elif node["silent_s"] is None:
        state, text = State.silent, "has not reported yet"
    elif down:
        state, text = State.silent, f"lacks {', '.join(down)}"
    else:
        state, text = State.running, "running"
    return NodeStatus(
        node_id=node["node_id"],
        name=node["name"],
        address=node["address"],
        region=node["region"],
        state=state,
        text=text,
    )


def _head(record: ClusterRecord, state: State, text: str) -> NodeStatus:
    address = str(record.head).rpartition(":")[0]
    return NodeStatus(node_id=HEAD, name=HEAD, address=address, region="", state=state, text=text)


def _unknown(record: ClusterRecord, reason: str) -> list[NodeStatus]:
    heads = [] if record.node_id is None else [_head(record, State.silent, reason)]
    try:
        members = current_members(open_ledger(compose_platform(record.overrides or ())), record.cluster_id)
    except (sa.exc.SQLAlchemyError, FalajError, OSError):
        members = {}
    return heads + [
        NodeStatus(
            node_id=member.node_id,
            name=member.name,
            address=member.address,
            region=member.region,
            state=State.silent,
            text="not known: the head does not answer",
        )
        for member in members.values()
        if member.node_id != record.node_id
    ]
