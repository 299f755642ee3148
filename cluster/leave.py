"""`python -m cluster.leave`: let this node finish its work, then take it out of the cluster.

Ray starts nothing new on the node, and Serve starts its replicas on other nodes first. The edge ends last. With
`node=…`, a dead node is removed from the list of nodes, from any other node.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import compose_platform, job
from cluster.errors import ClusterNotRunning, ConfigError
from cluster.host import processes
from cluster.ledger import open_ledger
from cluster.ledger.events import NodeLeft
from cluster.membership.departure import leave_membership
from cluster.membership.head_client import HeadClient
from cluster.membership.members import Member, current_members
from cluster.node.edge_leaving import announce_end_of_edge
from cluster.node.launch import StartFailed, end_all, remove_folders, run_command
from cluster.node.locks import command_lock
from cluster.node.log_uploads import upload_logs
from cluster.node.parts import Part, State, find_parts, state_of
from cluster.security.tokens.principal import current_actor
from cluster.session import ClusterRecord, find_record, is_up, require_recorded_cluster
from cluster.settings import PlatformConfig

DRAIN_COMMAND_S = 60.0
POLL_S = 0.5
_NODE_ID = re.compile(r"--node_id=([0-9a-f]+)")


@dataclass(kw_only=True, slots=True)
class LeaveConfig(PlatformConfig):
    """Configuration of this command."""

    deadline_s: int = 120
    """Seconds after which work that still runs is ended."""
    node: str | None = None

    def __post_init__(self) -> None:
        if self.deadline_s < 0:
            raise ValueError(f"deadline_s must not be negative, got {self.deadline_s}.")


@job("leave", LeaveConfig)
def main(config: LeaveConfig) -> None:
    """Drain and leave, or remove a dead node."""
    if config.node is not None:
        remove_dead(config, config.node)
        return
    record = find_record(config.storage)
    if record is None or record.node_id is None:
        raise ClusterNotRunning(
            "This machine is no node that joined a cluster. A head ends with `python -m cluster.down`; a dead node is "
            "removed with node=…"
        )
    node = compose_platform(record.overrides or ())
    with command_lock(record.storage):
        drain(node, record, deadline_s=config.deadline_s)
        announce_end_of_edge(record)
        ended = end_all(record)
        upload_logs(node, record)
        leave_membership(record, node, reason="left")
        remove_folders(record)
    print(f"node {record.node_id} has left; ended {ended} processes")


def drain(config: PlatformConfig, record: ClusterRecord, *, deadline_s: int) -> None:
    """Let Ray end this node's work, up to a deadline. If the head does not answer, a warning is printed."""
    parts = find_parts(record)
    if (supervisor := parts.get(Part.supervisor)) is not None:
        processes.end_process(supervisor, grace_s=5.0)  # it would start Ray again
    if not is_up(record):
        print("warning: the head does not answer, so running work is ended without a drain", file=sys.stderr)
        return
    raylet = parts.get(Part.raylet)
    if raylet is None or not (match := _NODE_ID.search(" ".join(raylet.cmdline()))):
        return
    command = [
        str(Path(sys.executable).parent / "ray"),
        "drain-node",
        f"--address={record.ray_address}",
        f"--node-id={match[1]}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=cluster.leave",
        f"--deadline-remaining-seconds={deadline_s}",
    ]
    try:
        run_command(command, config, record, failure="Ray did not drain", timeout_s=DRAIN_COMMAND_S)
    except StartFailed as error:
        reason = str(error).strip().rpartition("\n")[2]  # the last line of Ray's output has the reason
        print(f"warning: running work is ended without a drain: {reason}", file=sys.stderr)
        return
    print(f"draining; at most {deadline_s} s", flush=True)
    deadline = time.monotonic() + deadline_s
    # A draining raylet ends by itself when it has no work.
    while time.monotonic() < deadline and state_of(raylet) is not State.dead:
        time.sleep(POLL_S)


def remove_dead(config: PlatformConfig, wanted: str) -> None:
    """Record that a dead node has left.

    Raises:
        ConfigError: no such node, several of that name, or it is alive.
    """
    record = require_recorded_cluster(config)
    own = compose_platform(record.overrides or ())
    ledger = open_ledger(own)
    member = find_member(list(current_members(ledger, record.cluster_id).values()), wanted)
    nodes = HeadClient.of(record).request("nodes")
    alive = [node["node_id"] for node in nodes if node["alive"]] if isinstance(nodes, list) else []
    if member.node_id in alive:
        raise ConfigError(
            f"Node {member.node_id} ({member.name}) is alive. Run `python -m cluster.leave` there."
        )
    event = NodeLeft(cluster_id=record.cluster_id, node_id=member.node_id, reason="removed")
    ledger.append(event, actor=current_actor())
    print(f"node {member.node_id} ({member.name}, {member.address}) is removed")


def find_member(members: list[Member], wanted: str) -> Member:
    """Return the node with an id, name or address.

    Raises:
        ConfigError: there is none, or there are several.
    """
    # A node chooses its own name, so it must not hide another node's id.
    found = [member for member in members if member.node_id == wanted] or [
        member for member in members if wanted in (member.name, member.address)
    ]
    if len(found) == 1:
        return found[0]
    if not members:
        raise ConfigError("No other machine is a node of the cluster, so none can be removed.")
    known = ", ".join(f"{member.node_id} ({member.name}, {member.address})" for member in members)
    problem = "Several nodes are named" if found else "No node is named"
    raise ConfigError(f"{problem} '{wanted}'. Nodes: {known}. Give the id.")


if __name__ == "__main__":
    main()
