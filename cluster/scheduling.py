"""Background work beside serving: it reserves only CPUs that serving does not need, and yields to all other processes.

Ray's CPUs are numbers for its scheduler. They do not limit a process. So work that must not slow serving down also
needs the lowest priority of the operating system.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

LOWER_PRIORITY = f"{__name__}.lower_priority"
"""Name of the function that Ray calls in each worker process of a background command."""
_LOWEST = 19


def lower_priority() -> None:
    """Give this process the lowest priority: it gets only time that no other process wants.

    The process must end with its work, because it may not raise its priority again.
    """
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), _LOWEST)
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def priority_warning(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> str | None:
    """Return why priorities do not protect other sessions' processes on this machine; None if they do.

    With autogroups, Linux first divides time between sessions, unless the processes are in a control group for CPU
    time. Services of systemd and containers are in such a group.

    Args:
        proc: Where the proc file system is mounted.
        cgroups: Where the control groups are mounted.
    """
    try:
        is_on = (proc / "sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    if not is_on or any(_divides_cpu_time(*line.split(":", 2)[1:], cgroups=cgroups) for line in groups):
        return None
    return (
        "the kernel divides CPU time between sessions before it looks at priorities, so this work may slow serving "
        "down. Run the cluster as a service of systemd or in a container, or set the sysctl "
        "kernel.sched_autogroup_enabled=0"
    )


def _divides_cpu_time(controllers: str, path: str, *, cgroups: Path) -> bool:
    """Return whether a line of /proc/self/cgroup names a group with its own share of CPU time."""
    if path == "/":
        return False
    if controllers:  # cgroup v1
        return "cpu" in controllers.split(",")
    try:
        return "cpu" in (cgroups / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


class Cpus(NamedTuple):
    """Logical CPUs for background work."""

    free: float
    """CPUs that serving does not need."""
    serving: float
    """CPUs that serving may need."""


def background_cpus(node: str | None = None) -> Cpus:
    """Return the logical CPUs that background work may use. This process must be attached to Ray.

    Serving may need the CPUs of all replicas that its deployments may start.

    Args:
        node: Id of the only node where the work may run. By default, it may run on all nodes.
    """
    import ray

    alive = [one for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]
    usable = [one for one in alive if node is None or one["NodeID"] == node]
    serving = serving_cpus(_serve_details(), node=node)
    return Cpus(free=sum(one["Resources"].get("CPU", 0.0) for one in usable) - serving, serving=serving)


def serving_cpus(details: dict[str, Any], *, node: str | None = None) -> float:
    """Return the logical CPUs of all replicas that may start.

    Args:
        details: What Serve's controller says of its applications.
        node: Id of a node. Then the replicas that other nodes have now do not count.
    """
    return sum(
        max(0, _most_replicas(deployment["deployment_config"]) - _num_elsewhere(deployment, node))
        * float((deployment["deployment_config"].get("ray_actor_options") or {}).get("num_cpus", 1))
        for application in details.get("applications", {}).values()
        for deployment in application.get("deployments", {}).values()
    )


def _num_elsewhere(deployment: dict[str, Any], node: str | None) -> int:
    """Return how many replicas of a deployment run on other nodes."""
    replicas = deployment.get("replicas", ()) if node is not None else ()
    return sum(
        replica.get("node_id") not in (None, node) and replica.get("state") != "STOPPING"
        for replica in replicas
    )


def _most_replicas(config: dict[str, Any]) -> int:
    scaling = config.get("autoscaling_config")
    return int(scaling["max_replicas"] if scaling else config.get("num_replicas") or 1)


def _serve_details() -> dict[str, Any]:
    """Return what Serve's controller says; empty if Serve does not run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return {}
    details: dict[str, Any] = ray.get(controller.get_serve_instance_details.remote())
    return details
