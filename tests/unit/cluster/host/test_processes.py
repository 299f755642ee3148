"""Tests of finding and ending a cluster's processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cluster.host import processes
from cluster.node.parts import Part, processes_by_part
from tests.processes.other_user import NOBODY, needs_root

PROGRAM = "import sys; open('/proc/self/comm', 'w').write('gcs_server'); print(flush=True); sys.stdin.read()"


@pytest.fixture
def started() -> Iterator[ExitStack]:
    """Return a stack that ends the processes of a test."""
    with ExitStack() as stack:
        yield stack


def _start(stack: ExitStack, cluster_id: str, *, user: int | None = None) -> int:
    """Start a process with a cluster's id and a daemon's name; return its pid."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
    process = stack.enter_context(
        subprocess.Popen(
            [python, "-c", PROGRAM],
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            cwd="/",
            env={"PATH": os.environ["PATH"], processes.ID_VARIABLE: cluster_id},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


@needs_root
def test_another_users_process_is_not_found(started: ExitStack) -> None:
    """A root supervisor would otherwise restart a daemon with another user's command line."""
    cluster_id = f"{os.getpid()}-own"
    pid = _start(started, cluster_id, user=NOBODY)
    assert processes_by_part(processes.find(cluster_id)) == {}
    assert processes.end(cluster_id) == 0
    assert [process.pid for process in processes.find(cluster_id, owner=NOBODY)] == [pid]
    own_pid = _start(started, cluster_id)
    found = processes_by_part(processes.find(cluster_id))
    assert {part: process.pid for part, process in found.items()} == {Part.gcs: own_pid}


def test_job_finds_its_parents_but_does_not_end_them(started: ExitStack) -> None:
    """A raylet starts every job. Without its parents, `cluster.status` in a job would report the raylet as dead."""
    cluster_id = f"{os.getpid()}-job"
    job = (
        "import os; from cluster.host import processes; "
        f"pids = [process.pid for process in processes.find({cluster_id!r})]; "
        f"print(os.getppid() in pids, processes.end({cluster_id!r}))"
    )
    parent = (
        "import subprocess, sys; "
        f"print(subprocess.run([sys.executable, '-c', {job!r}], capture_output=True, text=True).stdout)"
    )
    result = subprocess.run(
        [sys.executable, "-c", parent],
        env=os.environ | {processes.ID_VARIABLE: cluster_id},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["True", "0"]


def test_free_ports_differ_and_can_be_bound() -> None:
    """They are below those of the replicas, and below those that the kernel gives to clients."""
    ports = processes.free_ports(3, "127.0.0.1")
    assert len(set(ports)) == 3
    assert all(processes.port_is_free(port) and 20_000 <= port < 30_000 for port in ports)
    with pytest.raises(OSError, match="no 20000 free ports"):
        processes.free_ports(20_000, "127.0.0.1")
