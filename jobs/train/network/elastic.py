"""The number of workers of a run that may have fewer workers than it wants: `scaling.num_workers=[1,2]`.

Before each start, the driver counts the workers for which a node has free CPUs and GPUs. If a worker dies, the run goes
on with as many as there is room for. While it has fewer than it wants, rank 0 looks for room at times. If there
is room, all ranks save a checkpoint and end, and the driver starts more of them.

Ray Train can resize a run itself (`ScalingConfig(num_workers=(1, 2))`). But it counts all CPUs of the nodes, so also
those that replicas hold, and it stops the workers without a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from cluster.errors import TrainingFailed
from cluster.placement import ScalingConfig, Selector

RESIZED = "resized"
"""Return value of workers that have ended because there is room for more of them."""
SETTLE_S = 5.0
"""Seconds to wait for room for all workers, for example until Ray has removed those of the last start."""
WAIT_S = 600.0
"""Seconds to wait for room for the smallest number of workers."""
_POLL_S = 0.5
Room = Callable[[], dict[str, dict[str, float]]]
"""Returns the free resources of each node where the workers may run, by the node's id."""


class Resized(Exception):
    """All ranks end, because there is room for more workers. Their state is saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerRange:
    """The numbers of workers that a run may have. It is plain data for workers."""

    smallest: int
    largest: int
    per_worker: dict[str, float]
    """Ray resources of one worker."""
    parts: int
    """Rows of a step and worker, of all backward passes, for one worker. A number of workers must divide it."""
    selector: Selector
    """Labels of the nodes where the workers may run."""

    @classmethod
    def of(
        cls, scaling: ScalingConfig, *, batch_rows: int, accumulation: int, selector: Selector
    ) -> WorkerRange:
        """Return the range of a configuration."""
        return cls(
            smallest=scaling.min_workers,
            largest=scaling.max_workers,
            per_worker=scaling.per_worker,
            parts=batch_rows // accumulation,
            selector=selector,
        )

    def best(self, possible: int) -> int:
        """Return the largest number of workers that is possible and divides the batch; 0 if there is none."""
        numbers = range(min(possible, self.largest), self.smallest - 1, -1)
        return next((number for number in numbers if self.parts % number == 0), 0)

    def fitting(self, room: dict[str, dict[str, float]], *, held: int = 0, node: str = "") -> int:
        """Return the best number of workers for the free resources. All workers of a run are on one node.

        Args:
            room: Free resources by node.
            held: Number of workers that run on `node` now. Their resources are not free, but theirs.
            node: Id of the node.
        """
        numbers = (
            int(min(free.get(name, 0.0) / amount for name, amount in self.per_worker.items() if amount))
            + (held if one == node else 0)
            for one, free in room.items()
        )
        return self.best(max(numbers, default=0))


def free_resources(selector: Selector) -> dict[str, dict[str, float]]:
    """Return the free resources of each node that has all labels of the selector, by the node's id."""
    from ray._private.state import available_resources_per_node  # Ray's public API only has their sum

    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return {
        node["NodeID"]: free.get(node["NodeID"], {})
        for node in alive
        if selector.items() <= node["Labels"].items()
    }


def wait_for_room(
    workers: WorkerRange,
    *,
    room: Room,
    sleep: Callable[[float], None] = time.sleep,
    settle_s: float = SETTLE_S,
) -> int:
    """Return the number of workers to start with.

    Raises:
        TrainingFailed: There is no room for the smallest number of workers for `WAIT_S`.
    """
    waited = 0.0
    while waited <= WAIT_S:
        number = workers.fitting(room())
        if number == workers.best(workers.largest) or (number and waited >= settle_s):
            return number
        if not number and waited == settle_s:
            print(f"waiting for room for {workers.smallest} workers", flush=True)
        sleep(_POLL_S)
        waited += _POLL_S
    raise TrainingFailed(
        f"No node has room for {workers.smallest} workers of {workers.per_worker}. Lower scaling.num_workers or "
        "scaling.cpus_per_worker, or raise cluster.num_cpus. The same run=… goes on at the last checkpoint."
    )


class GrowthWatch:
    """Tells rank 0 when there has been room for more workers twice in a row."""

    def __init__(self, workers: WorkerRange, *, held: int, node: str, room: Room) -> None:
        self._workers, self._held, self._node, self._room = workers, held, node, room
        self._had_room = False

    def __call__(self) -> bool:
        """Return whether the run should start again with more workers."""
        if self._held >= self._workers.best(self._workers.largest):
            return False
        best = self._workers.fitting(self._room(), held=self._held, node=self._node)
        had_room, self._had_room = self._had_room, best > self._held
        return had_room and self._had_room


def run_elastic(
    workers: WorkerRange,
    fit: Callable[[int, int], Any],
    *,
    max_restarts: int,
    room: Room,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Start a fit until it is finished.

    Args:
        workers: The numbers of workers that are allowed.
        fit: Runs the fit with so many workers; its second argument counts the starts. It returns Ray Train's result.
        max_restarts: After so many more deaths of workers, or failed starts in a row, the run fails.
        room: See `Room`.
        sleep: Waits for some seconds.

    Raises:
        TrainingFailed: The fit failed, or workers died or did not start too often.
    """
    starts = deaths = not_started = 0
    while True:
        number = wait_for_room(workers, room=room, sleep=sleep)
        print(f"{number} of {workers.smallest} to {workers.largest} workers", flush=True)
        starts += 1
        try:
            if fit(number, starts).return_value != RESIZED:
                return
            not_started = 0
        except WorkersNotStarted:
            not_started += 1
            if not_started > max_restarts:
                raise
        except WorkersDied:
            not_started = 0
            deaths += 1
            if deaths > max_restarts:
                raise


class WorkersDied(TrainingFailed):
    """Processes of workers ended without an error of their own, or hung."""


class WorkersNotStarted(TrainingFailed):
    """Workers did not start: there was less room than was counted, or their node ended."""
