"""Background work beside serving: it reserves only CPUs that serving does not need, and yields to all other processes.

Ray's CPUs are numbers for its scheduler. They do not limit a process. So work that must not slow serving down also
needs the lowest priority of the operating system.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

LOWER_PRIORITY = f"{__name__}.lower_priority"
"""Name of the function that Ray calls in each worker process of a background command."""
_LOWEST = 19


def lower_priority() -> None:
    """Give this process the lowest priority: it gets only time that no other process wants.

    The process must end with its work, because it may not raise its priority again.

    Linux may group processes by session (autogroup), and divide time between the groups first. Then a priority counts
    only among the processes of one session. So the process becomes a session of its own, with the lowest priority.
    """
    with contextlib.suppress(PermissionError):  # it is the leader of a process group
        os.setsid()
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # the kernel has no autogroups
            Path("/proc/self/autogroup").write_text(str(_LOWEST))
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), _LOWEST)
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def cpus_beside_serving() -> float:
    """Return how many of the cluster's logical CPUs serving does not need. This process must be attached to Ray.

    Serving needs the CPUs of all replicas that its deployments may start.
    """
    import ray  # imported only where work runs on Ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(0.0, resources.get("CPU", 0.0) - serving_cpus(_serve_details()))


def serving_cpus(details: dict[str, Any]) -> float:
    """Return the logical CPUs of all replicas that may start.

    Args:
        details: What Serve's controller says of its applications.
    """
    return sum(
        _most_replicas(deployment["deployment_config"])
        * float((deployment["deployment_config"].get("ray_actor_options") or {}).get("num_cpus", 1))
        for application in details.get("applications", {}).values()
        for deployment in application.get("deployments", {}).values()
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
