"""`python -m cluster.status [--env | --json] [key=value …]`: what runs, and what a shell needs to reach it."""

from __future__ import annotations

import json
import shlex
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from cluster import processes
from cluster.entrypoint import job
from cluster.session import ClusterRecord, require_record
from cluster.settings import PlatformConfig

FLAGS = ("--env", "--json")
GUARDED_BY = {
    "edge": "TLS and tokens of principals",
    "serve_http": "tokens, which replicas check; starts one where a version has none",
    "ray_metrics": "open to read",
    "edge_metrics": "open to read",
}
LOOPBACK_ADDRESSES = ("127.", "::1:", "::ffff:127.")


def show(record: ClusterRecord, flag: str | None) -> None:
    """Print the status in the form asked for."""
    match flag:
        case "--env":
            print(
                "\n".join(
                    f"export {name}={shlex.quote(value)}" for name, value in record.environment().items()
                )
            )
        case "--json":
            print(json.dumps(asdict(record) | {"applications": applications(record)}, indent=1))
        case _:
            _show_text(record)


def applications(record: ClusterRecord) -> dict[str, str]:
    """Serve application to its status; empty when the dashboard does not answer."""
    request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
    request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            content: dict[str, Any] = json.load(response)
    except (urllib.error.URLError, OSError):
        return {}
    return {name: str(app["status"]) for name, app in content.get("applications", {}).items()}


def listeners(record: ClusterRecord) -> dict[str, list[str]]:
    """Listening address to the names of the cluster's processes behind it."""
    found: dict[str, list[str]] = defaultdict(list)
    for process in processes.find(record.cluster_id):
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[f"{connection.laddr.ip}:{connection.laddr.port}"].append(process.name())
        except psutil.NoSuchProcess:
            continue
    return dict(sorted(found.items(), key=lambda item: int(item[0].rsplit(":", 1)[1])))


def _show_text(record: ClusterRecord) -> None:
    print(f"cluster {record.cluster_id}, up since {record.started_at}")
    print(f"project        {record.project_root}")
    print(f"state          {record.storage_root}")
    print(f"edge           {record.edge_url}")
    print(
        f"Ray dashboard  {record.edge_url}/ray/  (an admin's token), {record.dashboard_url}  ({record.token_path})"
    )
    print(f"metrics        {record.metrics_url}  {record.ray_metrics_url}")
    print(f"key broker     {record.key_socket}")
    print("Serve applications")
    for name, status in applications(record).items() or {"none": ""}.items():
        print(f"  {name} {status}")
    named = {port: name for name, port in record.ports.items()}
    print("listening")
    for address, names in listeners(record).items():
        port = int(address.rsplit(":", 1)[1])
        where = "loopback" if address.startswith(LOOPBACK_ADDRESSES) else "EVERY ADDRESS"
        guard = GUARDED_BY.get(named.get(port, ""), "Ray's token")
        print(f"  {address:23} {named.get(port, names[0]):26} {where}, {guard}")


def main() -> None:
    """Take our own flags off the line; the rest is configuration."""
    flag = next((argument for argument in sys.argv[1:] if argument in FLAGS), None)
    sys.argv = [argument for argument in sys.argv if argument not in FLAGS]
    job("cluster", PlatformConfig)(lambda config: show(require_record(config), flag))()


if __name__ == "__main__":
    main()
