"""Where work may run, a region or this node, and on how many workers. Ray gets label selectors and never a fallback.

Work waits forever for a label that no node has. So it is refused before it starts.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from cluster.host.this_node import this_node

REGION_LABEL, NODE_LABEL = "ray.io/availability-region", "ray.io/node-id"

Selector = dict[str, str]
"""Labels that a node must have, with their values; empty is any node."""


@dataclass(kw_only=True, slots=True)
class PlacementConfig:
    """Where a command's tasks, training workers and replicas may run."""

    region: str | None = None
    """Only on nodes of this region; null is any node."""


@dataclass(kw_only=True, slots=True)
class ScalingConfig:
    """Workers of a distributed training run."""

    num_workers: Any = 2
    """Number of workers. `[smallest, largest]` is a network that goes on with the workers for which there are CPUs."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, str):  # the record of a cluster has each option as text
            with contextlib.suppress(ValueError):
                self.num_workers = json.loads(self.num_workers)
        numbers = self.num_workers if isinstance(self.num_workers, list) else [self.num_workers] * 2
        if not all(type(number) is int for number in numbers) or len(numbers) != 2 or numbers[0] > numbers[1]:
            raise ValueError(
                "scaling.num_workers must be a number, or two numbers such as [1,2], the smaller one first, got "
                f"{self.num_workers}."
            )
        if int(numbers[0]) < 1:
            raise ValueError(f"scaling.num_workers must be at least 1, got {self.num_workers}.")

    @property
    def min_workers(self) -> int:
        """Smallest number of workers."""
        return int(self.num_workers[0] if self.is_elastic else self.num_workers)

    @property
    def max_workers(self) -> int:
        """Largest number of workers."""
        return int(self.num_workers[1] if self.is_elastic else self.num_workers)

    @property
    def is_elastic(self) -> bool:
        """Whether the number may change while a run goes on."""
        return isinstance(self.num_workers, list)

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray resources of one worker."""
        resources = {"CPU": self.cpus_per_worker}
        return resources | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})


def find_nodes(placement: PlacementConfig, *, on_this_node: str | None = None) -> Selector:
    """Return the selector of the nodes where work may run. This process must be attached to Ray.

    Args:
        placement: the command's configuration.
        on_this_node: why the work needs this node's disk, such as "checkpoints are on its disk"; None if it does not.
            On a cluster with one node it has no effect.

    Raises:
        ConfigError: no node that is alive may run the work.
    """
    import ray  # imported only where work runs on Ray

    selector: Selector = {} if placement.region is None else {REGION_LABEL: placement.region}
    if on_this_node is not None and this_node() is not None:
        selector[NODE_LABEL] = ray.get_runtime_context().get_node_id()
    if not selector:
        return selector
    alive = [node["Labels"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if any(selector.items() <= labels.items() for labels in alive):
        return selector
    regions = ", ".join(sorted({labels.get(REGION_LABEL, "none") for labels in alive}))
    if NODE_LABEL in selector:
        raise ConfigError(
            f"placement.region={placement.region}: this work runs on this node only, because {on_this_node}, and this "
            "node is in another region. Run the command on a node of that region."
        )
    raise ConfigError(
        f"placement.region={placement.region}: no node is in this region. Regions of nodes: {regions}."
    )


def here() -> dict[str, float]:
    """Return the Ray resource that only this node has, for Ray Tune, which knows no labels; empty on a single node."""
    if this_node() is None:
        return {}
    import ray

    return {f"node:{ray.util.get_node_ip_address()}": 0.001}  # type: ignore[no-untyped-call]


def options(selector: Selector) -> dict[str, Selector]:
    """Return the options of a task, an actor or a deployment with this selector."""
    return {"label_selector": selector} if selector else {}
