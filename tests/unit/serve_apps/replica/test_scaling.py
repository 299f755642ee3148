"""Wanted replicas, by Serve's own wrapper around our policy, and the load that a replica measures."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.settings import ReplicaConfig
from serve_apps.replica.ongoing import OngoingRequests
from serve_apps.replica.scaling import ONGOING, REQUESTED, replica_options
from tests.servers.edge import PREDICT, Edge

NO_DELAY = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}


def scaling(**options: Any) -> AutoscalingConfig:
    return replica_options(ReplicaConfig(**options))["autoscaling_config"]


def wanted(
    reported: list[float],
    *,
    running: int,
    target: int | None = None,
    seen_by_serve: float = 0.0,
    requested: dict[str, list[TimeStampedValue]] | None = None,
) -> int:
    """Return Serve's result of our policy for a target of ten requests, before its bounds."""
    config = scaling(target_ongoing_requests=10, max_replicas=9, **NO_DELAY)
    context = AutoscalingContext(
        deployment_id=None,
        deployment_name="predictor",
        app_name="m-v1",
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=[],
        total_num_requests=seen_by_serve,
        total_queued_requests=0.0,
        aggregated_metrics={ONGOING: dict(enumerate(reported))},
        raw_metrics={REQUESTED: requested or {}},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=config,
    )
    return math.ceil(_apply_autoscaling_config(config.policy.get_policy())(context)[0])


@pytest.mark.parametrize(
    ("reported", "running", "expected"),
    [([0.0], 1, 0), ([1e-6], 1, 1), ([10.0], 1, 1), ([10.5], 1, 2), ([30.0, 12.0], 2, 5), ([4.0, 4.0], 2, 1)],
)
def test_replicas_follow_the_reported_load(reported: list[float], running: int, expected: int) -> None:
    """One for every ten concurrent requests; one short request within the look-back time keeps the last replica."""
    assert wanted(reported, running=running) == expected


def test_requested_number_is_a_minimum() -> None:
    """The newest report counts. Load can need more replicas, and a replica may not have reported yet."""
    series = [TimeStampedValue(1.0, value=0.0), TimeStampedValue(2.0, value=3.0)]
    requested: dict[str, list[TimeStampedValue]] = {"a": series, "b": []}
    assert wanted([0.0], running=1, requested=requested) == 3
    assert wanted([50.0], running=1, requested=requested) == 5
    over = [*series, TimeStampedValue(3.0, value=0.0)]
    assert wanted([0.0], running=1, requested={"a": over}) == 0


def test_no_scale_down_before_all_replicas_have_reported() -> None:
    """A replica that has just started may be busy; scaling up is allowed."""
    assert wanted([], running=1) == 1
    assert wanted([0.0], running=2) == 2
    assert wanted([50.0], running=2) == 5


def test_version_without_replicas_starts_one_for_a_waiting_request() -> None:
    """Serve's proxy counts waiting requests; a starting replica is waited for."""
    assert wanted([], running=0) == 0
    assert wanted([], running=0, seen_by_serve=1.0) == 1
    assert wanted([], running=0, target=1) == 1


def test_policy_runs_in_a_process_without_our_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's controller may not have it."""
    policy = scaling().policy
    policy._cached_policy = None
    for name in [name for name in sys.modules if name.split(".")[0] in ("serve_apps", "cluster")]:
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    assert policy.get_policy().__name__ == "wanted_replicas"


def test_fixed_number_is_not_scaled() -> None:
    assert "autoscaling_config" not in replica_options(ReplicaConfig(num_replicas=3))
    assert replica_options(ReplicaConfig(num_replicas=3))["num_replicas"] == 3


def test_version_starts_with_a_replica() -> None:
    """So a deployment shows whether the version works."""
    assert (scaling().min_replicas, scaling().initial_replicas) == (0, 1)
    assert scaling(min_replicas=2).initial_replicas == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_replicas": 0},
        {"min_replicas": -1},
        {"max_replicas": 0},
        {"min_replicas": 3, "max_replicas": 2},
        {"target_ongoing_requests": 0},
        {"target_ongoing_requests": 65},
        {"look_back_s": 0},
        {"downscale_to_zero_delay_s": -1},
    ],
)
def test_invalid_scaling_numbers_are_refused(wrong: dict[str, Any]) -> None:
    """The message names the field."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReplicaConfig(**wrong)


class Clock:
    """A clock that the test sets."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


spans = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50)), max_size=20)


@given(spans)
def test_mean_equals_counting_at_every_moment(requests: list[tuple[int, int]]) -> None:
    """Little's law, compared with counting in each of 200 seconds."""
    clock = Clock()
    ongoing = OngoingRequests(clock)
    for start, length in sorted(requests, key=sum):
        clock.now = 1e9 + start + length
        ongoing.add(arrived=str(int((1e9 + start) * 1e6)), took_s=0.5)
    clock.now = 1e9 + 200
    counted = sum(start <= second < start + length for start, length in requests for second in range(200))
    assert ongoing.take() == pytest.approx(counted / 200, abs=1e-3)


def test_wait_counts_in_its_own_interval() -> None:
    """Taking the mean starts a new interval; waiting for the replica's own start is not its load."""
    clock = Clock()
    ongoing = OngoingRequests(clock)
    clock.now += 10
    ongoing.add(arrived=str(int((clock.now - 40) * 1e6)), took_s=0.1)
    assert ongoing.take() == pytest.approx(1.0)
    clock.now += 10
    assert ongoing.take() == 0.0


@pytest.mark.parametrize("arrived", [None, "1", str(int(1e9 * 1e6))])
def test_long_request_counts_as_one_at_most(arrived: str | None) -> None:
    """A body that took an hour to arrive is not 1,800 requests of the last two seconds."""
    clock = Clock()
    ongoing = OngoingRequests(clock)
    clock.now += 3600
    ongoing.take()
    clock.now += 2
    ongoing.add(arrived=arrived, took_s=3600.0)
    assert ongoing.take() == pytest.approx(1.0)


@pytest.mark.parametrize("arrived", [None, "", "-5", "soon", "9" * 20])
def test_invalid_arrival_counts_the_time_in_the_replica(arrived: str | None) -> None:
    """A client's value never gets here, but a clock may be changed."""
    clock = Clock()
    ongoing = OngoingRequests(clock)
    clock.now += 10
    ongoing.add(arrived=arrived, took_s=2.0)
    assert ongoing.take() == pytest.approx(0.2)


def test_edge_sends_the_arrival_time(edge: Edge) -> None:
    """A client cannot set it."""
    status, echo = edge.call(PREDICT, token=edge.token(), headers={"x-falaj-arrived": "1"})
    assert status == 200
    assert abs(int(echo["x-falaj-arrived"]) / 1e6 - time.time()) < 5
