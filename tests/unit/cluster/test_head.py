"""As whom a lost head's applications are restored, and how Ray's daemons are started again."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError, Unauthenticated
from cluster.node.parts import Part
from cluster.security.tokens.intent import read_intent
from cluster.security.tokens.issuer import ensure_issuer
from cluster.security.tokens.roles import Role
from cluster.security.tokens.trust import Trust
from cluster.session import ClusterRecord
from cluster.settings import IssuerConfig, PlatformConfig, StorageConfig
from cluster.storage import Layout
from cluster.supervisor import daemons, head
from tests.replica import record


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterRecord:
    """A cluster's record, with its folder for sockets."""
    (tmp_path / "run").mkdir(mode=0o700)
    return replace(record(tmp_path, "", 1), runtime_dir=str(tmp_path / "run"))


@pytest.fixture
def config(tmp_path: Path) -> PlatformConfig:
    return PlatformConfig(storage=StorageConfig(root=str(tmp_path)))


def test_the_supervisors_intent_is_for_restoring_alone(
    config: PlatformConfig, cluster: ClusterRecord
) -> None:
    """It is `system:supervisor`, with a role that no person has, in a file of its owner's alone."""
    places = Layout(config.storage.root)
    ensure_issuer(places)
    path = head.supervisor_intent(config, cluster)
    intents = Trust.of(config.identity.issuer, places).intents
    principal = read_intent(path, intents, entrypoint="serve_apps.deploy").principal
    assert (principal.subject, principal.role) == ("system:supervisor", Role.supervisor)
    with pytest.raises(Unauthenticated, match=r"not for 'feature_jobs\.ingest'"):
        read_intent(path, intents, entrypoint="feature_jobs.ingest")


def test_with_another_issuer_a_file_must_hold_the_intent(
    config: PlatformConfig, cluster: ClusterRecord
) -> None:
    """The message says what to set, and what a person can do meanwhile."""
    config.identity.issuer = IssuerConfig(url="https://issuer.example")
    with pytest.raises(ConfigError, match=r"supervisor_token_file.*serve_apps\.deploy action=restore"):
        head.supervisor_intent(config, cluster)
    config.identity.supervisor_token_file = "/run/secrets/supervisor.jwt"
    assert head.supervisor_intent(config, cluster) == Path("/run/secrets/supervisor.jwt")


def test_a_daemon_is_started_as_it_was_before(cluster: ClusterRecord, tmp_path: Path) -> None:
    """By its own command line and Ray's variables; one whose command line is not known is not."""
    told = tmp_path / "told"
    script = f'echo "$0 $RAY_gcs_storage $FALAJ_CLUSTER_ID" > {told}.new; mv {told}.new {told}'
    command = {"argv": ["sh", "-c", script, "gcs"], "variables": {"RAY_gcs_storage": "rocksdb"}, "cwd": "/"}
    (Path(cluster.runtime_folder) / "daemons.json").write_text(json.dumps({"gcs": command}))
    environment = {"FALAJ_CLUSTER_ID": "abc", "PATH": os.environ["PATH"]}
    assert daemons.restart_daemon(cluster, Part.gcs, environment, log=tmp_path / "log")
    deadline = time.monotonic() + 10
    while not told.exists():
        assert time.monotonic() < deadline
    assert told.read_text() == "gcs rocksdb abc\n"
    assert not daemons.restart_daemon(cluster, Part.dashboard, environment, log=tmp_path / "log")


@pytest.mark.parametrize("opened", ["run", "memory"])
def test_nothing_is_started_by_what_another_user_could_have_written(
    cluster: ClusterRecord, tmp_path: Path, opened: str
) -> None:
    """Neither a command line nor what the GCS knows: Ray opens an earlier release's folder to all, and a login manager
    may have removed the one in shared memory, so that it is anybody's to make."""
    (tmp_path / "memory").mkdir(mode=0o700)
    cluster = replace(cluster, gcs_dir=str(tmp_path / "memory" / "gcs"))
    command = {"argv": ["touch", str(tmp_path / "ran")], "variables": {}, "cwd": "/"}
    (Path(cluster.runtime_folder) / "daemons.json").write_text(json.dumps({"gcs": command}))
    (tmp_path / opened).chmod(0o777)
    with pytest.raises(ConfigError, match="mode 0777"):
        daemons.restart_daemon(cluster, Part.gcs, {"PATH": os.environ["PATH"]}, log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_restoring_is_due_until_somebody_has_done_it(cluster: ClusterRecord) -> None:
    """Whoever it was, the supervisor or a person."""
    assert not head.restore_is_due(cluster)
    (Path(cluster.runtime_folder) / "restore-due").touch()
    assert head.restore_is_due(cluster)
    head.restored(cluster)
    assert not head.restore_is_due(cluster)
