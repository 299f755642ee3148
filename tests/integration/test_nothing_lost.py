"""Tests under constant load, with two replicas for each variant.

No request fails, and each answer has exactly one row in the log.
FALAJ_LOAD_S=60 keeps the load up for longer after each disturbance, as `make chaos` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import pytest

from cluster.host import processes
from cluster.node.parts import Part, inspect_parts, not_running
from cluster.security.tls.certificates import EDGE_NAME, ensure_tls
from cluster.storage import Layout
from tests.clients.under_load import Outcome, UnderLoad
from tests.projects import scoring

if TYPE_CHECKING:
    from tests.integration.conftest import Project

PER_S = 60.0
AFTERWARDS = round(float(os.environ.get("FALAJ_LOAD_S", "2")) * PER_S)
"""Number of requests that are still sent after a disturbance."""
CONTROLLER, TWO = "ray::ServeController", "replica.num_replicas=2"


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Iterator[Project]:
    """Serve two versions with two replicas each. Each version gets half of the units."""
    scoring.prepare(falaj_cluster, versions=3)
    scoring.serve(falaj_cluster, TWO)
    yield falaj_cluster
    stop(falaj_cluster)


def stop(project: Project) -> None:
    """Free resources for the tests that follow.

    The champion stays, because the edge would not be ready without it.
    """
    project.run("serve_apps.rollout", "action=rollback", f"name={scoring.MODEL}", check=True)
    program = "import sys; from cluster.session import attach; from cluster.settings import PlatformConfig\n"
    program += "attach(PlatformConfig()); from ray import serve\n"
    program += "[serve.delete(name, _blocking=False) for name in sys.argv[1:]]"
    project.run_python("-c", program, *(f"{scoring.MODEL}-v{number}" for number in (1, 3)))


def check(outcome: Outcome, *, orphans: int = 0) -> None:
    """Require that no request failed and that no record was lost or doubled."""
    print(outcome)
    assert [(answer.status, answer.body[:200]) for answer in outcome.failed] == []
    assert (outcome.lost, outcome.twice, outcome.unrecorded) == (set(), set(), set())
    assert outcome.orphans <= orphans


def running(project: Project, title: str) -> list[psutil.Process]:
    """Return the cluster's processes whose command line contains `title`.

    Processes that end meanwhile are left out.
    """
    found = []
    for one in processes.find(project.record.cluster_id):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(one.cmdline()) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def replicas(project: Project, version: int) -> list[psutil.Process]:
    """Return the processes that serve a version."""
    return running(project, f"ServeReplica:{scoring.MODEL}-v{version}:")


def test_a_changed_weight_costs_no_request(project: Project) -> None:
    """The weight is changed and then changed back."""
    with UnderLoad(project, per_s=PER_S) as load:
        for weight in (10, 50):
            project.run(
                "serve_apps.rollout", "action=weight", f"name={scoring.MODEL}", f"weight={weight}", check=True
            )
        load.more(AFTERWARDS)
    check(load.outcome())


@pytest.mark.parametrize("version", [1, 2])
def test_a_killed_replica_costs_no_request(project: Project, version: int) -> None:
    """Another replica answers the requests that the killed replica had not answered.

    If the killed replica had already written a row for such a request, the row is counted as an orphan.
    """
    with UnderLoad(project, per_s=PER_S) as load:
        before = replicas(project, version)
        victim = random.choice(before)
        victim.send_signal(signal.SIGKILL)
        load.more(AFTERWARDS)
        load.until(lambda: len(replicas(project, version)) == len(before))
    check(load.outcome(), orphans=8)


def test_a_killed_serve_controller_costs_no_request(project: Project) -> None:
    """No request waits for the Serve controller, and the edge keeps its last known state."""
    with UnderLoad(project, per_s=PER_S) as load:
        [controller] = running(project, CONTROLLER)
        controller.send_signal(signal.SIGKILL)
        load.more(AFTERWARDS)
        load.until(lambda: [one.pid for one in running(project, CONTROLLER)] not in ([], [controller.pid]))
        load.more(AFTERWARDS)
    check(load.outcome())


def test_a_reload_of_the_edge_costs_no_request(project: Project) -> None:
    """After each of three reloads, the previous workers finish the requests that they have begun."""
    master = f"{project.record.runtime_folder}/master.sock"
    with UnderLoad(project, per_s=PER_S) as load:
        for _ in range(3):
            assert said(master, "reload").startswith("Success=1")
            load.more(AFTERWARDS)
    check(load.outcome())


def test_a_killed_gcs_broker_and_edge_controller_cost_no_request(project: Project) -> None:
    """All three are killed at once, and the supervisor restarts them.

    Serving can run without them for a while.
    """
    record = project.record
    lost = {
        one.part: one.process
        for one in inspect_parts(record)
        if one.part in (Part.gcs, Part.broker, Part.edge)
    }
    with UnderLoad(project, per_s=PER_S) as load:
        for process in lost.values():
            assert process is not None
            process.kill()
        killed_at = time.monotonic()
        load.until(lambda: not_running(inspect_parts(record)) == [])
        print(f"all run again after {time.monotonic() - killed_at:.1f} s")
        load.more(AFTERWARDS)
    check(load.outcome())
    now = {one.part: one.process for one in inspect_parts(record) if one.part in lost}
    assert all(now[part] != process for part, process in lost.items())


def said(address: str, line: str) -> str:
    """Send a line to HAProxy's master, and return its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(address)
        connection.sendall(line.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def test_a_restarted_edge_and_a_killed_controller_of_it_cost_no_request(project: Project) -> None:
    """A second edge is started beside the running one and takes over.

    A third one takes over after the controller was killed and HAProxy served alone.
    """
    with UnderLoad(project, per_s=PER_S) as load:
        second = restarted_edge(project, load)
        load.more(AFTERWARDS)
        second.kill()
        second.wait(20)
        load.more(AFTERWARDS)
        restarted_edge(project, load)
        load.more(AFTERWARDS)
    check(load.outcome())


def restarted_edge(project: Project, load: UnderLoad) -> subprocess.Popen[bytes]:
    """Start another edge, wait until its controller has taken over, and return its process."""
    edge = project.storage_root / "edge"

    def said() -> tuple[str, int]:
        return (edge / "controller.lock").read_text().strip(), json.loads((edge / "state.json").read_text())[
            "pid"
        ]

    _, before = said()
    with (edge / "controller.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve_apps.edge"],
            cwd=project.root,
            env=project.env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    load.until(lambda: said()[0] == str(process.pid) and said()[1] not in (before, None))
    return process


def test_a_new_certificate_costs_no_request(project: Project) -> None:
    """The edge presents a new certificate as soon as its file exists."""
    places = Layout(str(project.storage_root))
    file = project.storage_root / "tls" / EDGE_NAME
    host, port = urlsplit(project.edge_url).netloc.split(":")

    def shown() -> str:
        return ssl.get_server_certificate((host, int(port)))

    before = shown()
    with UnderLoad(project, per_s=PER_S) as load:
        file.unlink()
        ensure_tls(places)
        load.until(lambda: shown() != before)
        load.more(AFTERWARDS)
    check(load.outcome())


def test_a_new_version_costs_no_request(project: Project) -> None:
    """A version is promoted, and the next version starts beside it. The edge reloads several times."""
    with UnderLoad(project, per_s=PER_S) as load:
        run: Any = project.run
        run("serve_apps.rollout", "action=promote", f"name={scoring.MODEL}", check=True)
        start = ("action=start", f"name={scoring.MODEL}", "version=3", "weight=50", TWO)
        run("serve_apps.rollout", *start, check=True)
        load.more(AFTERWARDS)
    check(load.outcome())
