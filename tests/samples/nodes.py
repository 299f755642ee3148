"""An event of a node that joins a cluster."""

from __future__ import annotations

from cluster.ledger.events import NodeJoined


def node_joined(cluster_id: str, node_id: str) -> NodeJoined:
    return NodeJoined(
        cluster_id=cluster_id,
        node_id=node_id,
        name="second",
        address="10.9.9.8",
        region="local",
        num_cpus=1,
        num_gpus=0,
        certificate="c",
    )
