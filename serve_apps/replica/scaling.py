"""Options by which Serve scales a model version's replicas.

Serve (2.60) counts a replica's ongoing requests within the replica's own event loop. A model that never waits answers a
request within one step of that loop, so no count can fall between the request's start and end: under 100 busy
connections, 605 of 605 counts were zero. By that count no version would be scaled up, and a busy version would be
stopped as idle. So a replica measures its load itself (`serve_apps/replica/ongoing.py`), and the policy here takes the
greater of both.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.settings import ReplicaConfig

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

ONGOING = "falaj_ongoing_requests"
REPORT_INTERVAL_S = 2.0
"""Seconds between reports of replicas and Serve's proxy to Serve's controller. A request that arrives just when the
last replica leaves waits for the next report before a replica is started."""
MAX_STARTS = 3
"""Failed starts of a replica before its version counts as failed; more tries would fail in the same way."""


def replica_options(config: ReplicaConfig) -> dict[str, Any]:
    """Return options of `serve.deployment`: a fixed number of replicas, or bounds for autoscaling.

    A version starts with one replica even if its minimum is zero, so that a deployment shows whether it works.
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
    """Return the number of replicas that the load needs; Serve rounds it up and applies bounds and delays.

    A replica that has not reported yet may be busy, so the number does not go down until all have reported. Serve's
    controller unpickles this function. Of this module, it can use only `ONGOING`.
    """
    reported = (context.aggregated_metrics or {}).get(ONGOING, {})
    ongoing = max(sum(reported.values()), context.total_num_requests)
    wanted = ongoing / context.config.get_target_ongoing_requests()  # type: ignore[union-attr]
    if len(reported) < context.current_num_replicas or not context.current_num_replicas:
        wanted = max(wanted, context.target_num_replicas)
    return wanted, {}
