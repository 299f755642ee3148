"""Find out whether a process was killed because its node has too little memory.

Ray's memory monitor says so in the error of the task or actor. The kernel's kill looks like any other SIGKILL, but the
kernel counts its kills (`oom_kill` in `/proc/vmstat`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

from cluster.errors import TrainingFailed
from cluster.host.this_node import this_node

MAX_RESTARTS = 3
"""A fit is started again at most this often after the death of its process. A new submission of the run goes on."""
DIED_AGAIN = (
    "The process of the fit died again and again, or its node did. Look into the logs of its node. The same run=… goes "
    "on at the last checkpoint."
)
_MONITOR_TEXT = "running low on memory"
"""Ray's memory monitor writes this into the error of an actor that it kills."""
_KERNEL_COUNTERS = Path("/proc/vmstat")


def count_kernel_kills() -> int:
    """Return how many processes the kernel of this node has killed since its start because memory was used up."""
    for line in _KERNEL_COUNTERS.read_text().splitlines() if _KERNEL_COUNTERS.exists() else ():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def was_killed_by_ray(error: BaseException) -> bool:
    """Return whether Ray's memory monitor killed the process behind an error."""
    return any(
        isinstance(one, OutOfMemoryError) or (isinstance(one, RayError) and _MONITOR_TEXT in str(one))
        for one in causes(error)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors inside of it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "health_check_failure", None) or getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__


def run_task(start: Callable[[], Any], *, too_little_memory: str) -> Any:
    """Return the result of a Ray task. If its process dies, start it again, at most `MAX_RESTARTS` times.

    Args:
        start: Starts the task, without Ray's own retries: Ray starts a task that was killed for memory without end.
        too_little_memory: Message of a task that was killed for memory.

    Raises:
        TrainingFailed: The task was killed for memory, and is not started again. Or its process or node died too often.
    """
    for attempt in range(MAX_RESTARTS + 1):
        kills = count_kernel_kills()
        try:
            return ray.get(start())
        except (OutOfMemoryError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError) as error:
            # On a cluster with several nodes, the task may have run on another one, whose kernel has its own count.
            is_kernels = this_node() is None and count_kernel_kills() > kills
            if is_kernels or was_killed_by_ray(error):
                raise TrainingFailed(too_little_memory) from None
            if attempt == MAX_RESTARTS:
                raise TrainingFailed(DIED_AGAIN) from None
    raise AssertionError("unreachable")
