"""Background work yields the CPU, and leaves the CPUs of serving alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from cluster.scheduling import serving_cpus

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
autogroup = open("/proc/self/autogroup").read() if os.path.exists("/proc/self/autogroup") else "nice 19"
print(policies["before"], policies["after"], os.getsid(0) == os.getpid(), autogroup.split("nice")[1].strip())
"""


def test_all_threads_get_the_lowest_priority() -> None:
    """Those that run already, and those that start later. The process is a session of its own."""
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"({os.SCHED_IDLE}, 19) {os.SCHED_IDLE} True 19"


def test_a_process_that_leads_its_group_keeps_its_session() -> None:
    """It may not leave it, and gets the lowest priority nevertheless."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, process_group=0
    )
    assert result.stdout.startswith(f"({os.SCHED_IDLE}, 19) {os.SCHED_IDLE} False")


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
