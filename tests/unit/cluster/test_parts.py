"""Which process is which part of a cluster, and one command at a time that changes it."""

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

from cluster import processes
from cluster.errors import ConfigError
from cluster.node.launch import end_all
from cluster.node.locks import command_lock, is_watched_by, supervisor_lock
from cluster.node.parts import BROKER, EDGE, SUPERVISOR, Part, State, part_of, processes_by_part, state_of
from cluster.settings import StorageConfig
from tests.replica import record

PYTHON, SITE = "/venv/bin/python3", "/venv/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    ("name", "command", "part"),
    [
        ("python3", [PYTHON, "-m", BROKER, "storage.root=/s"], Part.broker),
        ("python3", [PYTHON, "-m", EDGE, "storage.root=/s"], Part.edge),
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
def test_a_part_is_known_by_its_command_line(name: str, command: list[str], part: Part | None) -> None:
    """Not a command of nearly the same name, and not a worker."""
    assert part_of(name, command) is part


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that is told apart from a part by nothing but its name."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def test_how_a_process_is_comes_from_the_kernel(sleeper: psutil.Process) -> None:
    """Running, stopped, dead and not yet reaped, gone."""
    assert state_of(sleeper) is State.running
    sleeper.suspend()
    while state_of(sleeper) is State.running:
        pass
    assert state_of(sleeper) is State.stopped
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait(10)
    assert state_of(sleeper) is state_of(None) is State.dead


def test_the_supervisor_is_ended_first(tmp_path: Path) -> None:
    """Or it would start the others again, while they are being ended; also one that is stopped."""
    started = (
        f"import time, sys; sys.argv = ['x']; open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(60)"
    )
    package = tmp_path / "cluster" / "supervisor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package.parent / "__init__.py").write_text("")
    (package / "__main__.py").write_text(started)
    ended_one = f"{os.getpid()}-test"
    environment = os.environ | {processes.ID_VARIABLE: ended_one}
    with subprocess.Popen([sys.executable, "-m", SUPERVISOR], cwd=tmp_path, env=environment) as watching:
        while not (tmp_path / "up").exists():
            assert watching.poll() is None
        assert set(processes_by_part(processes.find(ended_one))) == {Part.supervisor}
        psutil.Process(watching.pid).suspend()
        cluster = record(tmp_path, "", 1)
        object.__setattr__(cluster, "cluster_id", ended_one)
        assert end_all(cluster) == 1
        assert watching.poll() is not None


def test_one_command_at_a_time_changes_a_cluster(tmp_path: Path) -> None:
    """Two `cluster.up` at once would start two; the refusal names the one that is at it, and its end frees it."""
    storage = StorageConfig(root=str(tmp_path / "state"))
    with (
        command_lock(storage),
        pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) is running.*Wait"),
        command_lock(storage),
    ):
        pass
    with command_lock(storage):
        pass


def test_nobody_else_can_hold_a_clusters_locks(tmp_path: Path) -> None:
    """Who can read a file can lock it. The folder of an earlier release's state is open until it is closed."""
    tmp_path.chmod(0o755)
    storage, mask = StorageConfig(root=str(tmp_path)), os.umask(0o022)
    try:
        with command_lock(storage), supervisor_lock(storage):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(mask)
    assert modes == {"cluster.lock": 0o600, "supervisor.lock": 0o600}


def test_a_cluster_has_one_supervisor(tmp_path: Path) -> None:
    """A second one is refused, whoever starts it."""
    storage = StorageConfig(root=str(tmp_path))
    assert not is_watched_by(storage, os.getpid())
    with supervisor_lock(storage):
        assert is_watched_by(storage, os.getpid())
        with (
            pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) watches .* already"),
            supervisor_lock(storage),
        ):
            pass
