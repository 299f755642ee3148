"""`features` and `outcomes` have a replica on each of up to three nodes, by Serve's own wrapper around our policy."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from serve_apps.replica.scaling import one_replica_per_node


class Gcs:
    """The nodes that Ray's GCS knows, and how often it was asked."""

    def __init__(self) -> None:
        self.alive: dict[str, bool] = {"a": True}
        self.draining: dict[str, int] = {}
        self.is_down = False
        self.asked = 0

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        if self.is_down:
            raise ConnectionError("the GCS does not answer")
        return [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()]


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Gcs:
    gcs = Gcs()
    monkeypatch.setattr(ray, "nodes", gcs.nodes)
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: gcs.draining)
    return gcs


def wanted(target: int, state: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Return Serve's number of replicas, and the state for its next question."""
    config = one_replica_per_node()["autoscaling_config"]
    context = AutoscalingContext(
        deployment_id=None,
        deployment_name="features",
        app_name="features",
        current_num_replicas=target,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=3,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=config,
    )
    return _apply_autoscaling_config(config.policy.get_policy())(context)


def test_replicas_follow_the_nodes(gcs: Gcs) -> None:
    """A dead or draining node has no replica. More than three nodes have three replicas."""
    assert wanted(1)[0] == 1
    gcs.alive |= {"b": True, "c": True}
    assert wanted(1)[0] == 3
    gcs.alive |= {"d": True}
    assert wanted(3)[0] == 3
    gcs.alive = {"a": True, "b": False, "c": True}
    assert wanted(3)[0] == 2
    gcs.draining = {"c": 0}
    assert wanted(2)[0] == 1


def test_number_stays_while_the_gcs_does_not_answer(gcs: Gcs) -> None:
    """It is asked only every two seconds."""
    gcs.is_down = True
    number, state = wanted(2)
    assert (number, gcs.asked) == (2, 1)
    assert wanted(2, state)[0] == 2
    assert gcs.asked == 1
