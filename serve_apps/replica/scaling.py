"""How many replicas a model version has, as Serve is told.

Serve (2.60) looks at a replica's count of ongoing requests from within the replica's own event loop, and a model that
answers without waiting never leaves it one to see: under 100 busy connections 605 of 605 looks found none. By that
count no version would ever be scaled up, and a busy one would go as idle. So a replica measures by itself
(`serve_apps/replica/ongoing.py`), and the policy here takes the greater of both.
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
"""From replicas and Serve's proxy to its controller. A request that comes just when the last replica leaves waits for
the next report before one is started."""
MAX_STARTS = 3
"""Failed starts of a replica before its version counts as failed; what it refuses once, it refuses again."""


def replicas(config: ReplicaConfig) -> dict[str, Any]:
    """Options of `serve.deployment`: a fixed number of replicas, or bounds between which they follow the requests.

    A version starts with one replica even where it may have none, so that a deployment shows whether it works.
    """
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_constructor_retry_count": MAX_STARTS,
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    }
    if config.num_replicas is not None:
        return options | {"num_replicas": config.num_replicas}
    return options | {"autoscaling_config": _scaled(config)}


def _scaled(config: ReplicaConfig) -> AutoscalingConfig:
    with warnings.catch_warnings():
        # Serve means to replace the interval by environment variables, but 2.60 does not read those yet.
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
    """How many replicas the requests want; Serve rounds up and applies bounds and delays.

    A replica that has not reported yet may be busy, so until all have, nothing goes down. Serve's controller unpickles
    this function and has nothing of this module but `ONGOING`.
    """
    reported = (context.aggregated_metrics or {}).get(ONGOING, {})
    ongoing = max(sum(reported.values()), context.total_num_requests)
    wanted = ongoing / context.config.get_target_ongoing_requests()  # type: ignore[union-attr]
    if len(reported) < context.current_num_replicas or not context.current_num_replicas:
        wanted = max(wanted, context.target_num_replicas)
    return wanted, {}
