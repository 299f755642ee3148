"""Finding the running cluster, without one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray._private import ray_constants
from ray.exceptions import RayTaskError

from cluster import session
from cluster.errors import ArtifactTampered, ClusterNotRunning, ConfigError, SourceError
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig, StorageConfig


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell in an empty folder that knows of no cluster."""
    monkeypatch.delenv("FALAJ_PROJECT_ROOT", raising=False)
    monkeypatch.delenv("FALAJ_CLUSTER_RECORD", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of something that answers like our head node."""
    monkeypatch.setattr(session, "cluster_of_listener", lambda port: "abc")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def record(root: Path, port: int) -> ClusterRecord:
    """The record of a cluster whose project is `root`."""
    return ClusterRecord(
        cluster_id="abc",
        project_root=str(root),
        storage_root=str(root / ".falaj"),
        ray_address=f"127.0.0.1:{port}",
        dashboard_url="http://127.0.0.1:2",
        edge_url="https://127.0.0.1:3",
        metrics_url="http://127.0.0.1:4/metrics",
        ray_metrics_url="http://127.0.0.1:5/metrics",
        serve_http_url="http://127.0.0.1:6",
        token_path=str(root / ".falaj" / "keys" / "ray_token"),
        temp_dir="/tmp/falaj-abc",
        key_socket="/tmp/falaj-abc/keys/broker.sock",
        tls=False,
        ports={"gcs": port},
        pids={},
        started_at="2026-01-01T00:00:00+00:00",
    )


def test_without_a_record_it_is_said_how_to_start_one() -> None:
    """The first thing a newcomer meets."""
    with pytest.raises(ClusterNotRunning, match=r"python -m cluster\.up"):
        session.require_record(PlatformConfig())


def test_a_record_comes_back_as_it_was_written(shell: Path, head: int) -> None:
    """And its cluster counts as running while its head answers."""
    written = record(shell, head)
    session.write_record(written, StorageConfig())
    assert session.require_record(PlatformConfig()) == written
    assert session.read_record(StorageConfig()) == written


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}", '{"cluster_id": "abc"}', "\0\0"])
def test_a_damaged_record_is_named_and_what_can_be_done(shell: Path, content: str) -> None:
    """It was cut off, or is of nobody knows which release; no traceback."""
    path = shell / ".falaj" / "cluster.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"cluster\.json is damaged.*backup.*FALAJ_CLUSTER_RECORD="):
        session.require_record(PlatformConfig())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_process_on_the_heads_port_is_no_head(
    shell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GCS has died, somebody else has taken its port, and a driver would show it Ray's token.

    A user who is not root cannot see whose process it is otherwise.
    """
    monkeypatch.setattr(session, "cluster_of_listener", lambda port: None)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no python3 that every user may run")
    listens = (
        "import socket, sys; server = socket.create_server(('127.0.0.1', 0)); "
        "print(server.getsockname()[1], flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [python, "-c", listens], user=65534, stdin=pipe, stdout=pipe, text=True, cwd="/"
    ) as one:
        assert one.stdout is not None
        port = int(one.stdout.readline())
        assert not session.is_up(replace(record(shell, port), owner_uid=0))
        assert session.is_up(replace(record(shell, port), owner_uid=65534))
        one.kill()


def test_a_dead_clusters_record_is_told_apart(shell: Path, head: int) -> None:
    """It can still be found, to clean up behind it, but not be used."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = int(server.getsockname()[1])
    written = record(shell, silent)
    session.write_record(written, StorageConfig())
    assert session.find_record(StorageConfig()) == written
    assert session.read_record(StorageConfig()) is None
    with pytest.raises(ClusterNotRunning, match=r"does not answer.*cluster\.status.*cluster\.up"):
        session.require_record(PlatformConfig())


def test_a_record_of_another_release_can_be_read(shell: Path) -> None:
    """What an older one did not write is not known; what a newer one writes besides is passed over."""
    written = record(shell, 1)
    session.write_record(written, StorageConfig())
    path = Path(session.record_path(StorageConfig()))
    content = json.loads(path.read_text())
    for name in ("runtime_dir", "owner_uid", "gcs_dir", "overrides", "starting"):
        del content[name]
    path.write_text(json.dumps(content | {"of_a_newer_release": 1}))
    assert session.find_record(StorageConfig()) == written
    assert written.runtime_folder == written.temp_dir


def test_a_folder_below_the_project_finds_it(shell: Path, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any variable."""
    written = record(shell, head)
    session.write_record(written, StorageConfig())
    (shell / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(shell / "a" / "b")
    assert session.require_record(PlatformConfig()) == written


def test_a_shell_elsewhere_finds_it_by_the_printed_variables(
    shell: Path, head: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cluster.status --env` gives all that is needed, also when the storage root has another name."""
    storage = StorageConfig(root="state")
    written = replace(record(shell, head), storage_root=str(shell / "state"))
    session.write_record(written, storage)
    for name, value in written.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert session.require_record(PlatformConfig()) == written


def test_the_printed_variables_hold_no_secret(shell: Path) -> None:
    """The token's path, never the token."""
    written = record(shell, 1)
    Path(written.token_path).parent.mkdir(parents=True)
    Path(written.token_path).write_text("f00dfeed")
    environment = written.environment()
    assert environment["RAY_AUTH_TOKEN_PATH"] == written.token_path
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ADDRESS"] == written.ray_address
    assert not any("f00dfeed" in value for value in environment.values())


def test_the_refusal_behind_a_workers_error_is_found() -> None:
    """A closed gate stays a refusal when it was met inside a worker."""
    refusal = ArtifactTampered("model.txt is not the file that was registered")
    outer = RuntimeError("task failed")
    outer.__cause__ = refusal
    assert session.refusal_behind(outer) is refusal
    failure = RuntimeError("plain")
    assert session.refusal_behind(failure) is failure


def test_refusal_of_a_task_is_told_without_rays_traceback() -> None:
    """Ray raises an error that is of the refusal's kind and of its own."""
    refusal = SourceError("Source a.csv is empty.")
    raised = RayTaskError("f", "Traceback …", refusal).as_instanceof_cause()
    assert isinstance(raised, SourceError)
    assert session.refusal_behind(raised) is refusal


def test_ray_keeps_to_loopback_by_its_own_name_for_it() -> None:
    """The variable is written out, so that nobody has to import Ray to know it."""
    assert {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"} == session.LOOPBACK
