"""Paths that `cluster.status` reports as open to other users of the machine."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.node.permissions import permission_problems
from cluster.session import ClusterRecord
from cluster.storage import Layout
from tests.servers.replica import record

FILES = ("keys/ray_token", "keys/issuer.pem", "keys/intents/job.jwt", "tls/edge.pem", "tls/ca.key")


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterRecord:
    """The folders and files of a cluster, as a start creates them."""
    root, runtime = tmp_path / "state", tmp_path / "run"
    places = Layout(str(root))
    secret = (places.root, places.keys, f"{places.keys}/intents", places.tls)
    for folder in (*map(Path, (*secret, places.edge, f"{places.edge}/access")), runtime, runtime / "keys"):
        folder.mkdir(mode=0o700)
    (runtime / "ray").mkdir()
    (runtime / "ray").chmod(0o777)
    for name in (*FILES, "edge/routes.map"):
        (root / name).write_text("secret")
        (root / name).chmod(0o600)
    (root / "keys" / "jwks.json").write_text("public")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime / "keys" / "broker.sock"))
    return replace(
        record(root, str(runtime / "keys" / "broker.sock"), 1),
        runtime_dir=str(runtime),
        temp_dir=str(runtime / "ray"),
        owner_uid=os.geteuid(),
    )


def test_nothing_is_reported_after_a_start(cluster: ClusterRecord) -> None:
    """Ray's own folder is open, but no other user can reach it. Public keys may be readable."""
    assert permission_problems(cluster) == []


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *(("state", 0o755), ("state/keys", 0o750), ("state/tls", 0o711), ("state/edge", 0o755)),
        *(("state/keys/ray_token", 0o644), ("state/tls/edge.pem", 0o640)),
        ("state/keys/intents/job.jwt", 0o604),
        *(("state/edge/routes.map", 0o666), ("state/edge/access", 0o777), ("run/keys/broker.sock", 0o666)),
        *(("run", 0o777), ("run/keys", 0o777)),
    ],
)
def test_every_open_path_is_reported(cluster: ClusterRecord, tmp_path: Path, path: str, mode: int) -> None:
    """Folders that others can enter, files that they can change, and secrets that they can read."""
    (tmp_path / path).chmod(mode)
    problems = permission_problems(cluster)
    named = [problem for problem in problems if f"{tmp_path / path} " in problem]
    assert any(f"{mode:04o}" in problem for problem in named), problems


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_path_of_another_user_is_reported(cluster: ClusterRecord, tmp_path: Path) -> None:
    """A replaced folder for sockets, and a file of the edge."""
    os.chown(tmp_path / "run", 65534, 65534)
    os.chown(tmp_path / "state" / "edge" / "routes.map", 65534, 65534)
    problems = permission_problems(cluster)
    for path in ("run", "state/edge/routes.map"):
        assert f"{tmp_path}/{path} belongs to user 65534" in problems


def test_missing_folder_is_reported(cluster: ClusterRecord, tmp_path: Path) -> None:
    """A cleaner of temporary files or a reboot may have removed it."""
    (tmp_path / "run").rename(tmp_path / "swept")
    assert f"{tmp_path}/run does not exist" in permission_problems(cluster)
