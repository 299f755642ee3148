"""Tests of finding the running cluster, without starting one."""

from __future__ import annotations

import json
import socket
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
from tests.processes.other_user import needs_root, start_as_nobody
from tests.servers import replica


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, without variables of a cluster."""
    monkeypatch.delenv("FALAJ_PROJECT_ROOT", raising=False)
    monkeypatch.delenv("FALAJ_CLUSTER_RECORD", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return the port of a fake head node."""
    monkeypatch.setattr(session, "cluster_of_listener", lambda port: "abc")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def record(root: Path, port: int) -> ClusterRecord:
    """Return the record of a cluster whose project is `root`."""
    home = root / ".falaj"
    places = {
        "storage_root": str(home),
        "token_path": str(home / "keys" / "ray_token"),
        "temp_dir": "/tmp/falaj-abc",
    }
    return replace(replica.record(root, "", port), cluster_id="abc", ports={"gcs": port}, **places)


def test_missing_record_error_says_how_to_start_a_cluster() -> None:
    with pytest.raises(ClusterNotRunning, match=r"python -m cluster\.up"):
        session.require_running_cluster(PlatformConfig())


def test_record_is_read_back_unchanged(shell: Path, head: int) -> None:
    """The cluster counts as running while its head answers."""
    written = record(shell, head)
    session.write_record(written, StorageConfig())
    assert session.require_running_cluster(PlatformConfig()) == written
    assert session.find_running_record(StorageConfig()) == written


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{}", '{"cluster_id": "abc"}', "\0\0"])
def test_damaged_record_error_says_what_to_do(shell: Path, content: str) -> None:
    """It has the path of the file."""
    path = shell / ".falaj" / "cluster.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"cluster\.json is damaged.*backup.*FALAJ_CLUSTER_RECORD="):
        session.require_running_cluster(PlatformConfig())


@needs_root
def test_another_users_process_on_the_heads_port_does_not_count(
    shell: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver would send Ray's token to it. Without root rights, the process's cluster id is not visible."""
    monkeypatch.setattr(session, "cluster_of_listener", lambda port: None)
    listens = (
        "import socket, sys; server = socket.create_server(('127.0.0.1', 0)); "
        "print(server.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with start_as_nobody(listens) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert not session.is_up(replace(record(shell, port), owner_uid=0))
        assert session.is_up(replace(record(shell, port), owner_uid=65534))
        process.kill()


def test_record_of_a_dead_cluster_can_be_found_but_not_used(shell: Path, head: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = int(server.getsockname()[1])
    written = record(shell, silent)
    session.write_record(written, StorageConfig())
    assert session.find_record(StorageConfig()) == written
    assert session.find_running_record(StorageConfig()) is None
    with pytest.raises(ClusterNotRunning, match=r"does not answer.*cluster\.status.*cluster\.up"):
        session.require_running_cluster(PlatformConfig())


def test_record_of_another_release_is_readable(shell: Path) -> None:
    """Missing fields get their defaults, and unknown fields are ignored."""
    written = record(shell, 1)
    session.write_record(written, StorageConfig())
    path = Path(session.record_path(StorageConfig()))
    content = json.loads(path.read_text())
    for name in ("runtime_dir", "owner_uid", "gcs_dir", "overrides", "starting"):
        del content[name]
    path.write_text(json.dumps(content | {"of_a_newer_release": 1}))
    assert session.find_record(StorageConfig()) == written
    assert written.runtime_folder == written.temp_dir


def test_record_is_found_from_a_subfolder(shell: Path, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable is needed."""
    written = record(shell, head)
    session.write_record(written, StorageConfig())
    (shell / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(shell / "a" / "b")
    assert session.require_running_cluster(PlatformConfig()) == written


def test_record_is_found_from_elsewhere_with_the_variables(
    shell: Path, head: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cluster.status --env` prints all needed variables, also for another storage root."""
    storage = StorageConfig(root="state")
    written = replace(record(shell, head), storage_root=str(shell / "state"))
    session.write_record(written, storage)
    for name, value in written.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert session.require_running_cluster(PlatformConfig()) == written


def test_variables_hold_no_secret(shell: Path) -> None:
    """They have the token's path, and never the token."""
    written = record(shell, 1)
    Path(written.token_path).parent.mkdir(parents=True)
    Path(written.token_path).write_text("f00dfeed")
    environment = written.environment()
    assert environment["RAY_AUTH_TOKEN_PATH"] == written.token_path
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ADDRESS"] == written.ray_address
    assert not any("f00dfeed" in value for value in environment.values())


def test_refusal_is_found_behind_another_error() -> None:
    """Without a refusal, the error itself is returned."""
    refusal = ArtifactTampered("model.txt is not the file that was registered")
    outer = RuntimeError("task failed")
    outer.__cause__ = refusal
    assert session.refusal_behind(outer) is refusal
    failure = RuntimeError("plain")
    assert session.refusal_behind(failure) is failure


def test_refusal_is_found_behind_a_ray_error() -> None:
    """Ray's error is an instance of both classes."""
    refusal = SourceError("Source a.csv is empty.")
    raised = RayTaskError("f", "Traceback …", refusal).as_instanceof_cause()
    assert isinstance(raised, SourceError)
    assert session.refusal_behind(raised) is refusal


def test_loopback_variable_has_rays_name() -> None:
    """The name is written out, so that Ray need not be imported."""
    assert session.network_environment("127.0.0.1") == {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
