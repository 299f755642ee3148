"""Background work yields the CPU, and leaves the CPUs of serving alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import scheduling
from cluster.scheduling import Cpus, background_cpus, priority_warning, serving_cpus

SCRIPT = """
import os, threading
from cluster.scheduling import lower_priority
inside, done = threading.Event(), threading.Event()
policies = {}
def wait():
    inside.set()
    done.wait(60)
    policies["before"] = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
thread = threading.Thread(target=wait)
thread.start()
inside.wait(60)
lower_priority()
done.set()
thread.join()
later = threading.Thread(target=lambda: policies.update(after=os.sched_getscheduler(0)))
later.start()
later.join()
print(policies["before"], policies["after"])
"""


def test_all_threads_get_the_lowest_priority() -> None:
    """Those that run already, and those that start later."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"({os.SCHED_IDLE}, 19) {os.SCHED_IDLE}"


@pytest.mark.parametrize(
    ("autogroup", "group", "controllers", "warns"),
    [
        ("1", "3:cpuset:/a\n1:cpu,cpuacct:/", "", True),
        ("0", "1:cpu:/", "", False),
        ("1", "1:cpu:/docker/1", "", False),
        ("1", "4:cpuset:/docker/1\n1:cpu:/", "", True),
        ("1", "0::/system.slice/a.service", "cpuset cpu memory", False),
        ("1", "0::/system.slice/a.service", "memory", True),
        ("1", "0::/", "cpu", True),
        (None, "1:cpu:/", "", False),
    ],
)
def test_sessions_that_come_before_priorities_are_found(
    tmp_path: Path, autogroup: str | None, group: str, controllers: str, warns: bool
) -> None:
    """With cgroups of both versions. In a group with its own share of CPU time, the kernel makes no sessions."""
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "self").mkdir()
    if autogroup is not None:
        (tmp_path / "sys/kernel/sched_autogroup_enabled").write_text(f"{autogroup}\n")
    (tmp_path / "self/cgroup").write_text(f"{group}\n")
    (tmp_path / "cgroup.subtree_control").write_text(controllers)
    assert (priority_warning(tmp_path, tmp_path) is not None) == warns


def deployment(**config: Any) -> dict[str, Any]:
    return {"deployment_config": config}


def test_serving_needs_the_cpus_of_all_replicas_that_may_start() -> None:
    """Of a deployment that is scaled to zero, too. By default, a replica needs one CPU."""
    details = {
        "applications": {
            "a": {
                "deployments": {
                    "m": deployment(
                        autoscaling_config={"min_replicas": 0, "max_replicas": 4},
                        ray_actor_options={"num_cpus": 0.5},
                    ),
                    "n": deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1}),
                }
            },
            "b": {"deployments": {"p": deployment(num_replicas=None)}},
        }
    }
    assert serving_cpus(details) == 3.2
    assert serving_cpus({}) == 0


def test_replicas_on_other_nodes_need_no_cpus_of_a_node() -> None:
    """Those that are not started yet, or are being stopped elsewhere, may start on this node."""
    replicas = [
        {"node_id": "here", "state": "RUNNING"},
        {"node_id": "other", "state": "RUNNING"},
        {"node_id": "other", "state": "STOPPING"},
        {"node_id": None, "state": "STARTING"},
    ]
    busy = {**deployment(num_replicas=4), "replicas": replicas}
    details = {"applications": {"a": {"deployments": {"m": busy}}}}
    assert serving_cpus(details) == 4
    assert serving_cpus(details, node="here") == 3
    assert serving_cpus(details, node="other") == 3
    assert serving_cpus(details, node="third") == 2


def test_work_on_one_node_counts_the_cpus_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not those of others, or of nodes that are gone."""
    nodes = [
        {"NodeID": name, "Alive": is_alive, "Resources": {"CPU": cpus}}
        for name, is_alive, cpus in (("here", True, 2.0), ("other", True, 8.0), ("gone", False, 4.0))
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(scheduling, "_serve_details", lambda: {})
    assert background_cpus() == Cpus(free=10.0, serving=0)
    assert background_cpus("here") == Cpus(free=2.0, serving=0)
