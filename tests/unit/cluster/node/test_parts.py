"""Tests of recognising a cluster's parts, and of the locks for commands and the supervisor."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.errors import ConfigError
from cluster.host import processes
from cluster.node.launch import end_all
from cluster.node.locks import command_lock, is_watched_by, supervisor_lock
from cluster.node.parts import (
    BROKER,
    EDGE,
    ROLLOUTS,
    SUPERVISOR,
    UPLOADER,
    Part,
    State,
    expected_parts,
    part_of,
    processes_by_part,
    state_of,
)
from cluster.settings import StorageConfig
from tests.servers.replica import record

PYTHON, SITE = "/venv/bin/python3", "/venv/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    ("name", "command", "part"),
    [
        ("python3", [PYTHON, "-m", BROKER, "storage.root=/s"], Part.broker),
        ("python3", [PYTHON, "-m", UPLOADER, "storage.root=/s"], Part.uploader),
        ("python3", [PYTHON, "-m", EDGE, "storage.root=/s"], Part.edge),
        ("python3", [PYTHON, "-m", ROLLOUTS, "storage.root=/s"], Part.rollouts),
        ("python3", [PYTHON, "-X", "dev", "-m", SUPERVISOR], Part.supervisor),
        ("python3", [PYTHON, "-m", "serve_apps.edge.limits", "principal=a"], None),
        ("python3", [PYTHON, "-m", "pytest", "-m", BROKER], None),
        ("gcs_server", [f"{SITE}/ray/core/src/ray/gcs/gcs_server", "--log_dir=/l"], Part.gcs),
        ("raylet", [f"{SITE}/ray/core/src/ray/raylet/raylet"], Part.raylet),
        ("ray-dashboard-S", [PYTHON, f"{SITE}/ray/dashboard/dashboard.py", "--port=1"], Part.dashboard),
        ("python3", [PYTHON, "-u", f"{SITE}/ray/_private/log_monitor.py"], Part.log_monitor),
        ("python3", [PYTHON, "-u", f"{SITE}/ray/autoscaler/_private/monitor.py"], Part.monitor),
        ("python3", [PYTHON, "-m", "ray.util.client.server", "--port=1"], Part.client_server),
        ("haproxy", ["/bin/haproxy", "-W", "-S", "/m.sock", "-f", "/c"], Part.haproxy),
        ("ray::IDLE", ["ray::IDLE"], None),
        ("python3", [], None),
    ],
)
def test_part_is_recognised_by_its_command_line(name: str, command: list[str], part: Part | None) -> None:
    """Similar commands and workers are not parts."""
    assert part_of(name, command) is part


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """Start a process that is not a part."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_state_follows_the_kernel(sleeper: psutil.Process) -> None:
    assert state_of(sleeper) is State.running
    sleeper.suspend()
    while state_of(sleeper) is State.running:
        pass
    assert state_of(sleeper) is State.stopped
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait(10)
    assert state_of(sleeper) is state_of(None) is State.dead


def test_only_a_cluster_with_a_remote_root_has_an_uploader(tmp_path: Path) -> None:
    """Otherwise no log leaves the machine, and `cluster.status` must not call the uploader dead."""
    remote = record(tmp_path, "", 1, StorageConfig(root="s3://bucket/a", local=str(tmp_path)))
    assert Part.uploader in expected_parts(remote)
    assert Part.uploader not in expected_parts(record(tmp_path, "", 1))


def test_supervisor_ends_first(tmp_path: Path) -> None:
    """A running supervisor would restart the others. A stopped supervisor is ended too."""
    started = (
        f"import time, sys; sys.argv = ['x']; open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(60)"
    )
    package = tmp_path / "cluster" / "supervisor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent / "__init__.py").write_text("")
    (package / "__main__.py").write_text(started)
    cluster_id = f"{os.getpid()}-test"
    environment = os.environ | {processes.ID_VARIABLE: cluster_id}
    with subprocess.Popen([sys.executable, "-m", SUPERVISOR], cwd=tmp_path, env=environment) as supervisor:
        while not (tmp_path / "up").exists():
            assert supervisor.poll() is None
        assert set(processes_by_part(processes.find(cluster_id))) == {Part.supervisor}
        psutil.Process(supervisor.pid).suspend()
        cluster = record(tmp_path, "", 1)
        object.__setattr__(cluster, "cluster_id", cluster_id)
        assert end_all(cluster) == 1
        assert supervisor.poll() is not None


def test_second_command_is_refused_while_one_runs(tmp_path: Path) -> None:
    """The message names the pid of the running command. Its end releases the lock."""
    storage = StorageConfig(root=str(tmp_path / "state"))
    with (
        command_lock(storage),
        pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) is running.*Wait"),
        command_lock(storage),
    ):
        pass
    with command_lock(storage):
        pass


def test_lock_files_are_private(tmp_path: Path) -> None:
    """A process that can open a file can lock it. An earlier release's state folder may be readable for others."""
    tmp_path.chmod(0o755)
    storage, mask = StorageConfig(root=str(tmp_path)), os.umask(0o022)
    try:
        with command_lock(storage), supervisor_lock(storage):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(mask)
    assert modes == {"cluster.lock": 0o600, "supervisor.lock": 0o600}


def test_second_supervisor_is_refused(tmp_path: Path) -> None:
    storage = StorageConfig(root=str(tmp_path))
    assert not is_watched_by(storage, os.getpid())
    with supervisor_lock(storage):
        assert is_watched_by(storage, os.getpid())
        with (
            pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) already watches"),
            supervisor_lock(storage),
        ):
            pass
