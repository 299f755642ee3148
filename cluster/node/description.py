"""The record of a machine of a cluster, from its configuration."""

from __future__ import annotations

import datetime as dt
import os
from dataclasses import asdict, fields

from cluster.host import processes
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig, PortsConfig
from cluster.storage import layout, project_root


def describe_machine(
    config: PlatformConfig,
    *,
    cluster_id: str,
    ray_address: str | None = None,
    node_id: str | None = None,
    head: str | None = None,
) -> ClusterRecord:
    """Build the record of a head, or of a node that joined.

    Args:
        config: The machine's configuration.
        cluster_id: The cluster.
        ray_address: Address of Ray's GCS; None is this machine's own.
        node_id: Id of a node that joined.
        head: `host:port` where that node reaches the head's service for nodes.
    """
    ports, storage, address = all_ports(config), layout(config.storage), config.cluster.address
    runtime_dir = processes.runtime_dir(cluster_id if node_id is None else f"{cluster_id}-{node_id}")
    return ClusterRecord(
        cluster_id=cluster_id,
        node_id=node_id,
        head=head,
        project_root=str(project_root()),
        storage_root=storage.root,
        local_root=storage.local or None,
        address=address,
        ray_address=ray_address or f"{address}:{ports['gcs']}",
        dashboard_url=f"http://127.0.0.1:{ports['dashboard']}",
        edge_url=f"https://127.0.0.1:{ports['edge']}",
        metrics_url=f"http://127.0.0.1:{ports['edge_metrics']}/metrics",
        ray_metrics_url=f"http://127.0.0.1:{ports['ray_metrics']}/metrics",
        serve_http_url=f"http://127.0.0.1:{ports['serve_http']}",
        token_path=f"{storage.keys}/ray_token",
        temp_dir=f"{runtime_dir}/ray",
        key_socket=f"{runtime_dir}/keys/broker.sock",
        tls=config.cluster.tls,
        ports=ports,
        pids={},
        started_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        policy_environment=config.identity.environment,
        region=config.cluster.region,
        issuer=asdict(config.identity.issuer),
        tier=config.tier.value,
        runtime_dir=runtime_dir,
        owner_uid=os.geteuid(),
    )


def all_ports(config: PlatformConfig) -> dict[str, int]:
    """Return the configured ports by name."""
    return {field.name: getattr(config.cluster.ports, field.name) for field in fields(PortsConfig)}
