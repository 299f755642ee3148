"""Where work may run: a region, or this node. Ray gets label selectors and never a fallback.

Work waits forever for a label that no node has. So it is refused before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

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
