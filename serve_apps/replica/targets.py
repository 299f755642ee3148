"""Addresses of each Serve application, from the list that Serve publishes for load balancers.

If an application has no running replica, Serve publishes the address of its own proxy, whatever the reason. The proxy
holds a request until a replica is up. That is right for a version that was scaled to zero, because the request starts a
replica. It is wrong for a failed version, because the champion should answer its requests at once. So the proxy's
address is used only for an application that was scaled to zero.
"""

from __future__ import annotations

import ipaddress
import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.host.port_owner import open_own
from cluster.session import ClusterRecord

RUNNING = "RUNNING"
"""Serve's status of an application whose deployments are healthy or are being scaled."""
HEALTHY_STATUSES = frozenset({"HEALTHY", "UPSCALING", "DOWNSCALING"})
"""Serve's statuses of a healthy deployment. A deployment's status changes as soon as a replica is lost. The status of
its application changes a little later."""
_DEFAULT_HOST = "127.0.0.1"
"""Serve listens here if no host was set. In this case, Serve publishes no host."""
_RECOVERING = "RECOVERING"
"""State of a replica that is older than Serve's controller."""
_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class ScaledToZero:
    """An application without replicas. Serve's proxy accepts its requests and starts a replica."""

    servers: tuple[str, ...]
    """`host:port` of the proxy."""


Target = tuple[str, ...] | ScaledToZero
"""Addresses of an application's replicas, as `host:port`, or those of Serve's proxy, which starts a replica."""
Targets = dict[str, Target]


def addresses_of(target: Target) -> tuple[str, ...]:
    """Return the addresses to send requests to, for both kinds of target."""
    return target.servers if isinstance(target, ScaledToZero) else target


def uses_tls(address: str) -> bool:
    """Return whether a server at `host:port` speaks TLS: on every address but loopback."""
    return not is_loopback(address.rpartition(":")[0].strip("[]"))


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve_targets(record: ClusterRecord) -> Callable[[], Targets]:
    """Return a function that fetches the targets from Serve.

    Args:
        record: record of the running cluster.
    """

    def fetch() -> Targets:
        request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
        request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
        with open_own(request, owner=record.owner, timeout_s=_TIMEOUT_S) as response:
            return read_targets(json.load(response))

    return fetch


def read_targets(content: Mapping[str, Any]) -> Targets:
    """Return the applications that can be reached.

    Serve publishes replicas with the addresses of their nodes. They listen on these addresses, unless Serve was given a
    loopback host.

    Args:
        content: answer of `/api/serve/applications/`.

    Raises:
        ValueError: Serve's controller has just restarted, and does not list all running replicas yet.
    """
    for name, application in content["applications"].items():
        for deployment in application["deployments"].values():
            if any(replica["state"] == _RECOVERING for replica in deployment["replicas"]):
                raise ValueError(f"Serve's controller has restarted and is still finding replicas of {name}")
    host = content["http_options"].get("host", _DEFAULT_HOST)
    proxy_port = content["http_options"]["port"]
    targets: Targets = {}
    for group in content["target_groups"]:
        name, published = group["app_name"], group["targets"]
        if group["protocol"] != "HTTP" or not name or not published:
            continue
        servers = tuple(
            f"{host if is_loopback(host) else target['ip']}:{target['port']}" for target in published
        )
        if all(target["port"] != proxy_port for target in published):
            targets[name] = servers
        elif is_scaled_to_zero(content["applications"][name]):
            targets[name] = ScaledToZero(servers)
    return targets


def is_scaled_to_zero(application: Mapping[str, Any]) -> bool:
    """Return whether an application without a running replica is healthy and allowed to have none.

    The result is also True while the first replica starts for a request, and while the last replica stops.
    """
    return application["status"] == RUNNING and all(
        deployment["status"] in HEALTHY_STATUSES and _allows_zero_replicas(deployment)
        for deployment in application["deployments"].values()
    )


def _allows_zero_replicas(deployment: Mapping[str, Any]) -> bool:
    scaling = deployment["deployment_config"].get("autoscaling_config")
    return scaling is not None and scaling["min_replicas"] == 0
