"""Tests of restoring a lost head: the supervisor's intent, and restarts of Ray's daemons."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError, Unauthenticated
from cluster.node.launch import StartFailed, gcs_folder
from cluster.node.parts import Part
from cluster.security.tokens.intent import read_intent
from cluster.security.tokens.issuer import ensure_issuer
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord
from cluster.settings import IssuerConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout
from cluster.supervisor import daemons, head
from tests.servers.replica import record


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterRecord:
    """Return a cluster's record, with its folder for sockets."""
    (tmp_path / "run").mkdir(mode=0o700)
    return replace(record(tmp_path, "", 1), runtime_dir=str(tmp_path / "run"))


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    return PlatformConfig(storage=StorageConfig(root=str(tmp_path)))


def test_supervisor_intent_allows_only_the_restore_command(
    config: PlatformConfig, cluster: ClusterRecord
) -> None:
    """It acts as `system:supervisor` with the role supervisor."""
    places = Layout(config.storage.root)
    ensure_issuer(places)
    path = head.supervisor_intent(config, cluster)
    intents = Trust.of(config.identity.issuer, places).intents
    principal = read_intent(path, intents, entrypoint="serve_apps.deploy").principal
    assert (principal.subject, principal.role) == ("system:supervisor", Role.supervisor)
    with pytest.raises(Unauthenticated, match=r"not for 'feature_jobs\.ingest'"):
        read_intent(path, intents, entrypoint="feature_jobs.ingest")


def test_another_issuer_requires_an_intent_file(config: PlatformConfig, cluster: ClusterRecord) -> None:
    """The message names the setting and the manual command."""
    config.identity.issuer = IssuerConfig(url="https://issuer.example")
    with pytest.raises(ConfigError, match=r"supervisor_token_file.*serve_apps\.deploy action=restore"):
        head.supervisor_intent(config, cluster)
    config.identity.supervisor_token_file = "/run/secrets/supervisor.jwt"
    assert head.supervisor_intent(config, cluster) == Path("/run/secrets/supervisor.jwt")


def test_daemon_restarts_with_its_saved_command(cluster: ClusterRecord, tmp_path: Path) -> None:
    """It gets Ray's saved variables. A daemon without a saved command is not started."""
    output = tmp_path / "output"
    script = f'echo "$0 $RAY_gcs_storage $FALAJ_CLUSTER_ID" > {output}.new; mv {output}.new {output}'
    command = {"argv": ["sh", "-c", script, "gcs"], "variables": {"RAY_gcs_storage": "rocksdb"}, "cwd": "/"}
    (Path(cluster.runtime_folder) / "daemons.json").write_text(json.dumps({"gcs": command}))
    environment = {"FALAJ_CLUSTER_ID": "abc", "PATH": os.environ["PATH"]}
    assert daemons.restart_daemon(cluster, Part.gcs, environment, log=tmp_path / "log")
    deadline = time.monotonic() + 10
    while not output.exists():
        assert time.monotonic() < deadline
    assert output.read_text() == "gcs rocksdb abc\n"
    assert not daemons.restart_daemon(cluster, Part.dashboard, environment, log=tmp_path / "log")


@pytest.mark.parametrize("opened", ["run", "memory"])
def test_daemon_does_not_start_from_a_folder_open_to_others(
    cluster: ClusterRecord, tmp_path: Path, opened: str
) -> None:
    """Another user could have changed the command or the GCS's state there."""
    (tmp_path / "memory").mkdir(mode=0o700)
    cluster = replace(cluster, gcs_dir=str(tmp_path / "memory" / "gcs"))
    command = {"argv": ["touch", str(tmp_path / "ran")], "variables": {}, "cwd": "/"}
    (Path(cluster.runtime_folder) / "daemons.json").write_text(json.dumps({"gcs": command}))
    (tmp_path / opened).chmod(0o777)
    with pytest.raises(ConfigError, match="mode 0777"):
        daemons.restart_daemon(cluster, Part.gcs, {"PATH": os.environ["PATH"]}, log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_restore_is_due_until_marked_as_restored(cluster: ClusterRecord) -> None:
    assert not head.restore_is_due(cluster)
    (Path(cluster.runtime_folder) / "restore-due").touch()
    assert head.restore_is_due(cluster)
    head.mark_restored(cluster)
    assert not head.restore_is_due(cluster)


class Ray:
    """A double of Ray's start: it records whether it finds the state of a lost head, and fails if a test says so."""

    def __init__(self) -> None:
        self.starts: list[bool] = []
        self.fails = False

    def start(self, config: PlatformConfig, record: ClusterRecord) -> None:
        """Start with the state of the GCS, or with none."""
        self.starts.append(gcs_folder(record).exists())
        if self.fails:
            raise StartFailed("Ray did not start")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(head, "start_ray", ray.start)
    monkeypatch.setattr(head, "start_serve", lambda *_: None)
    monkeypatch.setattr(head, "save_commands", lambda _: None)
    monkeypatch.setattr(head.processes, "end", lambda *_, **__: 0)
    return ray


def test_new_head_of_several_nodes_continues_with_the_state_of_the_lost_one(
    config: PlatformConfig, cluster: ClusterRecord, ray: Ray, tmp_path: Path
) -> None:
    """If Ray does not start with the old state, the next attempt starts without it. A later loss is a new case."""
    cluster = replace(cluster, address="10.9.9.9", gcs_dir=str(tmp_path / "run" / "gcs"))
    gcs_folder(cluster).mkdir()
    head.replace_head(config, cluster)
    ray.fails = True
    with pytest.raises(StartFailed):
        head.replace_head(config, cluster)
    ray.fails = False
    head.replace_head(config, cluster)
    gcs_folder(cluster).mkdir()
    head.replace_head(config, cluster)
    assert ray.starts == [True, True, False, True]


def test_state_is_kept_if_only_serve_fails(
    config: PlatformConfig, cluster: ClusterRecord, ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has started with it. A later loss of the head must not discard it."""

    def fail(*_: object) -> None:
        raise StartFailed("Serve did not start")

    cluster = replace(cluster, address="10.9.9.9", gcs_dir=str(tmp_path / "run" / "gcs"))
    gcs_folder(cluster).mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(head, "start_serve", fail)
        with pytest.raises(StartFailed):
            head.replace_head(config, cluster)
    head.replace_head(config, cluster)
    assert ray.starts == [True, True]


def test_failed_start_with_state_in_redis_names_the_way_out(
    config: PlatformConfig, cluster: ClusterRecord, ray: Ray
) -> None:
    """The supervisor never stops trying, because only `cluster.down` gives up the state."""
    config.cluster.gcs.url = "redis://10.9.9.9"
    ray.fails = True
    with pytest.raises(StartFailed, match=r"may be damaged: `python -m cluster\.down` removes it"):
        head.replace_head(config, cluster)


def test_new_head_of_one_node_starts_with_no_state(
    config: PlatformConfig, cluster: ClusterRecord, ray: Ray, tmp_path: Path
) -> None:
    """All replicas were lost with the head, so there is nothing to continue."""
    cluster = replace(cluster, gcs_dir=str(tmp_path / "run" / "gcs"))
    gcs_folder(cluster).mkdir()
    head.replace_head(config, cluster)
    assert ray.starts == [False]
