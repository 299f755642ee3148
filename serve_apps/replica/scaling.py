"""Options with which Serve scales the replicas of a model version.

Serve (2.60) counts a replica's ongoing requests within the replica's own event loop. A model that never waits answers a
request within one step of that loop, so no count happens between the request's start and end. Under 100 busy
connections, 605 of 605 counts were zero. With these counts, Serve would never scale up a version, and would stop a busy
version as idle. So a replica measures its load itself (`serve_apps/replica/ongoing.py`). The policy in this module uses
the greater of both numbers.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.settings import ReplicaConfig

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

ONGOING = "falaj_ongoing_requests"
REQUESTED = "falaj_requested_replicas"
"""The number of replicas that a rollout has requested. The newest report counts, not a mean."""
REPORT_INTERVAL_S = 2.0
"""Seconds between two reports that a replica or Serve's proxy sends to Serve's controller. If a request arrives just
when the last replica stops, the request waits for the next report before a replica is started."""
MAX_SPREAD = 3
"""Largest number of nodes on which `features` or `outcomes` has a replica."""
MAX_STARTS = 3
"""After this many failed starts of a replica, its version counts as failed. More tries would fail in the same way."""


def replica_options(config: ReplicaConfig) -> dict[str, Any]:
    """Return options for `serve.deployment`: a fixed number of replicas, or bounds for autoscaling.

    A version starts with one replica even if its minimum is zero, so that a deployment shows whether the version works.
    """
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_constructor_retry_count": MAX_STARTS,
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    }
    if config.num_replicas is not None:
        return options | {"num_replicas": config.num_replicas}
    return options | {"autoscaling_config": _autoscaling(config)}


def _autoscaling(config: ReplicaConfig) -> AutoscalingConfig:
    with warnings.catch_warnings():
        # Serve deprecates the interval in favour of environment variables, but 2.60 does not read those yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=config.min_replicas,
            initial_replicas=max(1, config.min_replicas),
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            downscale_to_zero_delay_s=config.downscale_to_zero_delay_s,
            look_back_period_s=config.look_back_s,
            metrics_interval_s=REPORT_INTERVAL_S,
            policy=AutoscalingPolicy(policy_function=wanted_replicas),  # type: ignore[no-untyped-call]
        )


def wanted_replicas(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the number of replicas that the load or a rollout needs. Serve rounds up and applies bounds and delays.

    A replica that has not reported yet may be busy. So the number does not decrease until all replicas have reported.
    Serve's controller unpickles this function, so the only names of this module that it can use are the metrics'.
    """
    reported = (context.aggregated_metrics or {}).get(ONGOING, {})
    ongoing = max(sum(reported.values()), context.total_num_requests)
    wanted = ongoing / context.config.get_target_ongoing_requests()  # type: ignore[union-attr]
    if len(reported) < context.current_num_replicas or not context.current_num_replicas:
        wanted = max(wanted, context.target_num_replicas)
    requested = (context.raw_metrics or {}).get(REQUESTED, {})
    return max([wanted, *(series[-1].value for series in requested.values() if series)]), {}


def one_replica_per_node() -> dict[str, Any]:
    """Return options for `serve.deployment`: a replica on each of up to `MAX_SPREAD` nodes.

    So requests are answered if a node is lost. Nodes join and leave while the application runs. With a fixed number of
    replicas, an application would wait for nodes that have not joined.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        autoscaling = AutoscalingConfig(
            min_replicas=1,
            initial_replicas=1,
            max_replicas=MAX_SPREAD,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            metrics_interval_s=REPORT_INTERVAL_S,
            policy=AutoscalingPolicy(policy_function=num_usable_nodes),  # type: ignore[no-untyped-call]
        )
    return {"autoscaling_config": autoscaling, "max_replicas_per_node": 1}


def num_usable_nodes(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return the number of nodes that take work. The policy's state has the last number, which is used for two seconds.

    Serve's controller unpickles this function, so it imports what it uses.
    """
    import contextlib
    import time

    import ray

    now, state = time.monotonic(), dict(context.policy_state or {})
    if now >= state.get("asked_at", -1e9) + 2.0:
        state = {"asked_at": now, "nodes": state.get("nodes", context.target_num_replicas)}
        with contextlib.suppress(Exception):  # the GCS may be starting again
            draining = ray._private.state.state.get_draining_nodes()
            nodes = ray.nodes()  # type: ignore[no-untyped-call]
            alive = [node["NodeID"] for node in nodes if node["Alive"]]
            state["nodes"] = float(sum(node not in draining for node in alive))
    return min(max(1.0, state["nodes"]), context.config.max_replicas), state  # type: ignore[union-attr]
