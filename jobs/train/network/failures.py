"""End a run that cannot succeed. After every error of a worker, Ray Train would start the same fit again.

A worker that finds the cause itself raises it. A worker that was killed for memory cannot say so, see
`jobs.train.memory`. So each worker reports its node's count of kills at its start, and after the death of a worker the
count is read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import (  # the public API has no names for them
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import RefusedError, TrainingFailed, refusal_behind
from jobs.train.memory import causes, count_kernel_kills, was_killed_by_ray
from jobs.train.network.elastic import WorkersDied, WorkersNotStarted

TOO_LITTLE_MEMORY = (
    "A training worker has too little memory. Lower model.batch_size, or raise deepspeed.gradient_accumulation or "
    "deepspeed.zero_stage."
)
_DIED = (RayError, WorkerHealthCheckTimeoutError)
_NOT_STARTED = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
_NODE_TIMEOUT_S = 20.0
_NODE, _KILLS = "node_id", "oom_kills"


def report_node() -> None:
    """Tell the controller this worker's node and its count of kills. All workers call this together."""
    node = ray.get_runtime_context().get_node_id()
    ray.train.report({_NODE: node, _KILLS: count_kernel_kills()})


class EndOfHopelessRuns(UserCallback):
    """Ray Train calls this object in the process that restarts the workers. An error that it raises ends the run."""

    def __init__(self) -> None:
        self._kills: dict[str, int] = {}

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Remember the count of each node."""
        for reported in metrics:
            if _NODE in reported:
                self._kills[reported[_NODE]] = reported[_KILLS]

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """End the run if another try would fail too.

        Raises:
            TrainingFailed: The fit diverged, or a worker had too little memory.
            RefusedError: An input is refused.
        """
        for error in worker_exceptions.values():
            cause = refusal_behind(error)
            if isinstance(cause, RefusedError | TrainingFailed):
                raise cause
        is_killed = any(was_killed_by_ray(error) for error in worker_exceptions.values())
        # The kernel may have killed some other process of the node. An error of a worker's own code has another cause.
        has_died = any(
            isinstance(one, RayError) for error in worker_exceptions.values() for one in causes(error)
        )
        if is_killed or (has_died and any(_kills_on(node) > before for node, before in self._kills.items())):
            raise TrainingFailed(TOO_LITTLE_MEMORY)


def reason_of(error: TrainingFailedError) -> RefusedError | TrainingFailed | None:
    """Return why a run ended, or None for an error in the code of a family. Its traceback says more."""
    cause = refusal_behind(error)
    if isinstance(cause, RefusedError | TrainingFailed):
        return cause
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, _NOT_STARTED):
        return WorkersNotStarted(
            "Training workers could not start again and again: their nodes ended, or other processes took their room. "
            "The same run=… goes on at the last checkpoint."
        )
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    if not any(isinstance(inner, _DIED) for one in failures for inner in causes(one)):
        return None
    return WorkersDied(
        "Training workers died or hung again and again, without a word from Ray or the kernel about memory. Look into "
        "the logs of their nodes. The same run=… goes on at the last checkpoint."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a process could not get memory: for Python, or for a tensor on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _kills_on(node: str) -> int:
    """Return the count of a node; 0 if the node does not answer, because it may have ended."""
    if node == ray.get_runtime_context().get_node_id():
        return count_kernel_kills()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(count_kernel_kills)
    try:
        return int(ray.get(remote.options(scheduling_strategy=strategy).remote(), timeout=_NODE_TIMEOUT_S))
    except RayError:
        return 0
