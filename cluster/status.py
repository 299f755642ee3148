"""`python -m cluster.status [--env | --json] [key=value …]`: show the cluster's state, or the variables to reach it.

Exit code 1 means that a part does not run, applications are not restored yet, or a path has a wrong owner or wrong
permissions.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.entrypoint import job
from cluster.host import processes
from cluster.host.port_owner import open_own
from cluster.node.certificates import describe_certificate
from cluster.node.parts import NodeStatus, Part, PartStatus, State, inspect_parts, not_running
from cluster.node.permissions import permission_problems
from cluster.session import ClusterRecord, addresses, require_recorded_cluster, require_running_cluster
from cluster.settings import PlatformConfig
from cluster.supervisor.head import restore_is_due

FLAGS = ("--env", "--json")
GUARDED_BY = {
    "edge": "TLS and tokens of principals",
    "nodes": "certificates of nodes, join tokens",
    "serve_http": "tokens, which replicas check; starts a replica if a version has none",
    "ray_metrics": "open to read",
    "edge_metrics": "open to read",
    "supervisor_metrics": "open to read",
    "broker_metrics": "open to read",
    "edge_controller_metrics": "open to read",
    "nodes_metrics": "open to read",
    "uploader_metrics": "open to read",
    "scheduler_metrics": "open to read",
    "jobs_metrics": "open to read",
    "rollouts_metrics": "open to read",
}
_SERVER_DOWN = re.compile(
    r'^haproxy_server_status\{proxy="([^"]+)",server="([^"]+)_(\d+)",state="DOWN"\} 1$', re.MULTILINE
)
LOOPBACK_ADDRESSES = ("127.", "::1:", "::ffff:127.")
EVERY_ADDRESS = ("0.0.0.0:", ":::")


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """Health of a cluster."""

    parts: list[PartStatus]
    problems: list[str]
    """Paths with a wrong owner or wrong permissions, and folders that are missing."""
    restoring: bool
    """Whether some applications of a lost head are not restored yet."""
    nodes: list[NodeStatus]
    """The other nodes."""

    @property
    def is_healthy(self) -> bool:
        nodes_run = all(node.state is State.running for node in self.nodes)
        return nodes_run and not (not_running(self.parts) or self.problems or self.restoring)


def health(record: ClusterRecord) -> Health:
    """Check every part and the permissions of every path."""
    nodes: list[NodeStatus] = []
    if record.has_nodes:
        # Imported here, because it imports the ledger and certificates, which one machine's state does not need.
        from cluster.node.other_nodes import node_statuses

        nodes = node_statuses(record)
    return Health(
        parts=inspect_parts(record),
        problems=permission_problems(record),
        restoring=restore_is_due(record),
        nodes=nodes,
    )


def show(config: PlatformConfig, flag: str | None) -> None:
    """Print the status in the requested format. Exit with 1 if the cluster is not healthy."""
    if flag == "--env":
        variables = require_running_cluster(config).environment()
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
        return
    record = require_recorded_cluster(config)
    cluster_health = health(record)
    if flag == "--json":
        details = {
            "applications": applications(record),
            "silent_replicas": silent_replicas(record),
            "parts": {status.part.value: status.state.value for status in cluster_health.parts},
            "permission_problems": cluster_health.problems,
            "restoring": cluster_health.restoring,
            "nodes": [asdict(node) for node in cluster_health.nodes],
        }
        print(json.dumps(asdict(record) | details, indent=1))
    else:
        _show_text(record, cluster_health)
    if not cluster_health.is_healthy:
        sys.exit(1)


def applications(record: ClusterRecord) -> dict[str, str]:
    """Return the status of each Serve application; empty if the dashboard does not answer."""
    request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
    try:
        request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
        with open_own(request, owner=record.owner, timeout_s=5) as response:
            content: dict[str, Any] = json.load(response)
    except (urllib.error.URLError, OSError):
        return {}
    return {name: str(app["status"]) for name, app in content.get("applications", {}).items()}


def silent_replicas(record: ClusterRecord) -> dict[str, list[str]]:
    """Return, for each Serve application, the addresses of replicas that do not answer the edge's health checks.

    The result is empty if the edge does not answer. Serve reports an application as RUNNING even if a replica hangs.
    """
    try:
        request = urllib.request.Request(record.metrics_url)
        with open_own(request, owner=record.owner, timeout_s=5) as response:
            return servers_down(response.read().decode())
    except (urllib.error.URLError, OSError):
        return {}


def servers_down(metrics: str) -> dict[str, list[str]]:
    """Parse HAProxy's Prometheus metrics, and return the addresses of servers that are down, by HAProxy backend."""
    by_backend: dict[str, list[str]] = defaultdict(list)
    for backend, host, port in _SERVER_DOWN.findall(metrics):
        by_backend[backend].append(f"{host}:{port}")
    return dict(by_backend)


def listeners(record: ClusterRecord) -> dict[str, list[str]]:
    """Return, for each address that the cluster listens on, the names of the listening processes. Sorted by port."""
    by_address: dict[str, list[str]] = defaultdict(list)
    for process in processes.find(record.instance, owner=record.owner):
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    by_address[f"{connection.laddr.ip}:{connection.laddr.port}"].append(process.name())
        except psutil.NoSuchProcess:
            continue
    return dict(sorted(by_address.items(), key=lambda item: int(item[0].rsplit(":", 1)[1])))


def _show_health(cluster_health: Health) -> None:
    print("parts")
    for status in cluster_health.parts:
        pid = f"pid {status.process.pid}" if status.process is not None else ""
        mark = "" if status.state is State.running else "  <- problem"
        print(f"  {status.part:18} {status.state:16} {pid}{mark}".rstrip())
    lacking = not_running(cluster_health.parts)
    if cluster_health.restoring:
        print("  the head was lost; its applications are being restored (progress: edge/supervisor.log)")
    if any(status.part is Part.supervisor for status in lacking):
        print(
            "  without the supervisor, parts are not restarted: `python -m cluster.up` starts all missing parts"
        )
    elif lacking:
        print("  the supervisor restarts them; `python -m cluster.up` waits until all run")
    if cluster_health.nodes:
        print("other nodes")
    for node in cluster_health.nodes:
        mark = "" if node.state is State.running else "  <- problem"
        print(f"  {node.node_id} {node.name:18} {node.address:15} {node.region:10} {node.text}{mark}")
    problems = cluster_health.problems
    print("permissions    " + ("closed to other users" if not problems else "problems:"))
    for problem in problems:
        print(f"  {problem}")
    if problems:
        print("  `python -m cluster.up` closes the cluster's own folders; close other paths with chmod")


def _show_text(record: ClusterRecord, cluster_health: Health) -> None:
    role = "" if record.node_id is None else f", node {record.node_id} of the head at {record.head}"
    print(f"cluster {record.cluster_id}{role}, up since {record.started_at}")
    print("Serve applications")
    silent = silent_replicas(record)
    for name, status in applications(record).items() or {"none": ""}.items():
        mark = f"  <- does not answer: {', '.join(silent[name])}" if name in silent else ""
        print(f"  {name} {status}{mark}")
    print(f"project        {record.project_root}")
    print(f"state          {record.storage_root}")
    print(addresses(record))
    print(f"key broker     {record.key_socket}")
    print(f"certificate    {describe_certificate(record, ray_started_at=_raylet_started_at(cluster_health))}")
    port_names = {port: name for name, port in record.ports.items()}
    print("listening")
    for address, names in listeners(record).items():
        port = int(address.rsplit(":", 1)[1])
        reach = _reach(address)
        guard = GUARDED_BY.get(port_names.get(port, ""), "Ray's token")
        print(f"  {address:23} {port_names.get(port, names[0]):26} {reach}, {guard}")
    _show_health(cluster_health)


def _raylet_started_at(cluster_health: Health) -> float | None:
    raylet = next((each.process for each in cluster_health.parts if each.part is Part.raylet), None)
    try:
        return None if raylet is None else float(raylet.create_time())
    except psutil.NoSuchProcess:
        return None


def _reach(address: str) -> str:
    """Return which machines reach a listener."""
    if address.startswith(LOOPBACK_ADDRESSES):
        return "loopback"
    return "EVERY ADDRESS" if address.startswith(EVERY_ADDRESS) else "network"


def main() -> None:
    """Run the command. Remove its own flags from the arguments first, because Hydra reads all other arguments."""
    flag = next((argument for argument in sys.argv[1:] if argument in FLAGS), None)
    sys.argv = [argument for argument in sys.argv if argument not in FLAGS]
    job("cluster", PlatformConfig)(lambda config: show(config, flag))()


if __name__ == "__main__":
    main()
