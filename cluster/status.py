"""`python -m cluster.status [--env | --json] [key=value …]`: what runs, and what a shell needs to reach it.

Exit code 1 says that a part does not run, or that a path is open to other users of this machine.
"""

from __future__ import annotations

import json
import os
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

from cluster import processes
from cluster.entrypoint import job
from cluster.node.parts import Part, Seen, State, look, missing
from cluster.node.permissions import permission_problems
from cluster.own_server import open_own
from cluster.session import ClusterRecord, metrics_urls, recorded, require_record
from cluster.settings import PlatformConfig
from cluster.supervisor.head import restore_is_due

FLAGS = ("--env", "--json")
GUARDED_BY = {
    "edge": "TLS and tokens of principals",
    "serve_http": "tokens, which replicas check; starts one where a version has none",
    "ray_metrics": "open to read",
    "edge_metrics": "open to read",
    "supervisor_metrics": "open to read",
    "broker_metrics": "open to read",
    "edge_controller_metrics": "open to read",
}
_SERVER_DOWN = re.compile(
    r'^haproxy_server_status\{proxy="([^"]+)",server="([^"]+)_(\d+)",state="DOWN"\} 1$', re.MULTILINE
)
LOOPBACK_ADDRESSES = ("127.", "::1:", "::ffff:127.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """How a cluster is."""

    parts: list[Seen]
    problems: list[str]
    """What is open to others."""
    restoring: bool
    """Whether its applications are not all back yet."""

    @property
    def well(self) -> bool:
        return not (missing(self.parts) or self.problems or self.restoring)


def health(record: ClusterRecord) -> Health:
    """Look at every part and every path."""
    return Health(parts=look(record), problems=permission_problems(record), restoring=restore_is_due(record))


def show(config: PlatformConfig, flag: str | None) -> None:
    """Print the status in the form asked for, and exit 1 if something is wrong."""
    if flag == "--env":
        variables = require_record(config).environment()
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
        return
    record = recorded(config)
    found = health(record)
    if flag == "--json":
        plain = {
            "applications": applications(record),
            "silent_replicas": silent_replicas(record),
            "parts": {one.part.value: one.state.value for one in found.parts},
            "permission_problems": found.problems,
            "restoring": found.restoring,
        }
        print(json.dumps(asdict(record) | plain, indent=1))
    else:
        _show_text(record, found)
    if not found.well:
        sys.exit(1)


def applications(record: ClusterRecord) -> dict[str, str]:
    """Serve application to its status; empty when the dashboard does not answer."""
    request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
    try:
        request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
        with open_own(request, owner=record.owner, timeout_s=5) as response:
            content: dict[str, Any] = json.load(response)
    except (urllib.error.URLError, OSError):
        return {}
    return {name: str(app["status"]) for name, app in content.get("applications", {}).items()}


def silent_replicas(record: ClusterRecord) -> dict[str, list[str]]:
    """Serve application to the addresses of its replicas that do not answer the edge; empty when the edge does not.

    Serve goes on calling an application RUNNING while one of its replicas is alive and hangs.
    """
    try:
        owner = os.geteuid() if record.owner_uid is None else record.owner_uid
        with open_own(urllib.request.Request(record.metrics_url), owner=owner, timeout_s=5) as response:
            return servers_down(response.read().decode())
    except (urllib.error.URLError, OSError):
        return {}


def servers_down(metrics: str) -> dict[str, list[str]]:
    """HAProxy's backend to the addresses that its health checks found down, from its Prometheus metrics."""
    found: dict[str, list[str]] = defaultdict(list)
    for proxy, host, port in _SERVER_DOWN.findall(metrics):
        found[proxy].append(f"{host}:{port}")
    return dict(found)


def listeners(record: ClusterRecord) -> dict[str, list[str]]:
    """Listening address to the names of the cluster's processes behind it."""
    found: dict[str, list[str]] = defaultdict(list)
    for process in processes.find(record.cluster_id, owner=record.owner):
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[f"{connection.laddr.ip}:{connection.laddr.port}"].append(process.name())
        except psutil.NoSuchProcess:
            continue
    return dict(sorted(found.items(), key=lambda item: int(item[0].rsplit(":", 1)[1])))


def _show_health(found: Health) -> None:
    print("parts")
    for one in found.parts:
        pid = f"pid {one.process.pid}" if one.process is not None else ""
        mark = "" if one.state is State.running else "  <- not as it should be"
        print(f"  {one.part:18} {one.state:16} {pid}{mark}".rstrip())
    lacking = missing(found.parts)
    if found.restoring:
        print(
            "  the head was lost; its applications are being restored (edge/supervisor.log says how it goes)"
        )
    if any(one.part is Part.supervisor for one in lacking):
        print("  nobody starts what is missing: `python -m cluster.up` does, and the supervisor with it")
    elif lacking:
        print("  the supervisor starts it again; `python -m cluster.up` waits until all runs")
    print("permissions    " + ("closed to other users" if not found.problems else "NOT as they should be:"))
    for problem in found.problems:
        print(f"  {problem}")
    if found.problems:
        print("  `python -m cluster.up` closes the cluster's own folders; close other paths with chmod")


def _show_text(record: ClusterRecord, found: Health) -> None:
    print(f"cluster {record.cluster_id}, up since {record.started_at}")
    print(f"project        {record.project_root}")
    print(f"state          {record.storage_root}")
    print(f"edge           {record.edge_url}")
    print(
        f"Ray dashboard  {record.edge_url}/ray/  (an admin's token), {record.dashboard_url}  ({record.token_path})"
    )
    print(f"metrics        {' '.join(metrics_urls(record))}")
    print(f"key broker     {record.key_socket}")
    print("Serve applications")
    silent = silent_replicas(record)
    for name, status in applications(record).items() or {"none": ""}.items():
        mark = f"  <- does not answer: {', '.join(silent[name])}" if name in silent else ""
        print(f"  {name} {status}{mark}")
    named = {port: name for name, port in record.ports.items()}
    print("listening")
    for address, names in listeners(record).items():
        port = int(address.rsplit(":", 1)[1])
        where = "loopback" if address.startswith(LOOPBACK_ADDRESSES) else "EVERY ADDRESS"
        guard = GUARDED_BY.get(named.get(port, ""), "Ray's token")
        print(f"  {address:23} {named.get(port, names[0]):26} {where}, {guard}")
    _show_health(found)


def main() -> None:
    """Take our own flags off the line; the rest is configuration."""
    flag = next((argument for argument in sys.argv[1:] if argument in FLAGS), None)
    sys.argv = [argument for argument in sys.argv if argument not in FLAGS]
    job("cluster", PlatformConfig)(lambda config: show(config, flag))()


if __name__ == "__main__":
    main()
