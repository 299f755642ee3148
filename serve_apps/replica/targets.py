"""Where each Serve application is answered, from what Serve publishes for load balancers.

For an application without a running replica Serve names its own proxy, whatever the reason. The proxy holds a request
until there is a replica: right for a version that was scaled to zero, because that is what starts one; wrong for one
that failed, whose share somebody else should answer at once. So the proxy is taken for the first alone.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.own_server import open_own
from cluster.session import ClusterRecord

RUNNING = "RUNNING"
"""Serve's word for an application whose deployments are healthy or just being scaled on requests."""
WELL = frozenset({"HEALTHY", "UPSCALING", "DOWNSCALING"})
"""The same of a deployment; it changes in the moment in which a replica is lost, the application's a little later."""
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 (read, not bound)
_UNSAID = "127.0.0.1"
"""Where Serve listens if it was not told, which it does not publish then."""
_RECOVERING = "RECOVERING"
"""State of a replica that was there before Serve's controller was."""


@dataclass(frozen=True, slots=True)
class Waker:
    """Serve's proxy, in the place of an application that is asleep."""

    servers: tuple[str, ...]
    """`host:port`."""


Target = tuple[str, ...] | Waker
"""An application's replicas, as `host:port`, or who wakes it."""
Targets = dict[str, Target]


def addresses_of(target: Target) -> tuple[str, ...]:
    """Where a request is sent, which is the same for both; only the patience is not."""
    return target.servers if isinstance(target, Waker) else target


def serve_targets(record: ClusterRecord) -> Callable[[], Targets]:
    """A function that asks Serve where each application is answered.

    Args:
        record: of the running cluster.
    """

    def fetch() -> Targets:
        request = urllib.request.Request(f"{record.dashboard_url}/api/serve/applications/")
        request.add_header("Authorization", f"Bearer {Path(record.token_path).read_text().strip()}")
        with open_own(request, owner=record.owner, timeout_s=5) as response:
            return read_targets(json.load(response))

    return fetch


def read_targets(content: Mapping[str, Any]) -> Targets:
    """The applications that can be reached.

    Serve publishes replicas at their nodes' addresses, but they listen where its proxy was told to: on loopback, say.

    Args:
        content: of `/api/serve/applications/`.

    Raises:
        ValueError: Serve's controller has been started again, and for a moment lists no address of replicas that run.
    """
    for name, application in content["applications"].items():
        for deployment in application["deployments"].values():
            if any(replica["state"] == _RECOVERING for replica in deployment["replicas"]):
                raise ValueError(f"its controller has started again and is still finding replicas of {name}")
    host = content["http_options"].get("host", _UNSAID)
    proxy_port = content["http_options"]["port"]
    found: Targets = {}
    for group in content["target_groups"]:
        name, targets = group["app_name"], group["targets"]
        if group["protocol"] != "HTTP" or not name or not targets:
            continue
        servers = tuple(
            f"{target['ip'] if host in _EVERYWHERE else host}:{target['port']}" for target in targets
        )
        if all(target["port"] != proxy_port for target in targets):
            found[name] = servers
        elif is_asleep(content["applications"][name]):
            found[name] = Waker(servers)
    return found


def is_asleep(application: Mapping[str, Any]) -> bool:
    """Whether an application without a running replica is well: it may have none, and Serve finds nothing wrong.

    That includes one whose replica is just starting for a request, and one whose last replica is just leaving.
    """
    return application["status"] == RUNNING and all(
        one["status"] in WELL and _may_have_none(one) for one in application["deployments"].values()
    )


def _may_have_none(deployment: Mapping[str, Any]) -> bool:
    scaling = deployment["deployment_config"].get("autoscaling_config")
    return scaling is not None and scaling["min_replicas"] == 0
