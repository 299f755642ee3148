"""The process of the controller: it answers callers at its socket, acts on verdicts, and outlives a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.ledger.events import PolicyDecided, RolloutRolledBack
from cluster.security.tokens.issuer import ensure_issuer, mint_token
from cluster.security.tokens.roles import Role
from cluster.session import write_record
from cluster.settings import StorageConfig
from cluster.storage import Layout
from tests.samples.model_versions import registered
from tests.samples.policies import started_ledger
from tests.servers.polling import wait_until
from tests.servers.replica import listener, record

MODULE = "serve_apps.rollout.controller.service"


class Cluster:
    """The record of a cluster without Ray, and its ledger with a rollout that follows a policy."""

    def __init__(self, root: Path, socket_path: Path) -> None:
        self.root, self.socket = root, socket_path
        self.places = Layout(str(root))
        ensure_issuer(self.places)
        self.ledger = started_ledger(f"sqlite:///{self.places.ledger_path}")
        for version in (1, 2):
            self.ledger.append(registered("m", version), actor="bob")

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", MODULE, f"storage.root={self.root}"]
        return subprocess.Popen(command, cwd=self.root, stderr=subprocess.PIPE, text=True)

    def call(self, body: Any = None) -> tuple[int, Any]:
        token = mint_token(self.places, subject="ann", role=Role.ml_engineer, purpose="p", ttl_s=60)
        transport = httpx.HTTPTransport(uds=str(self.socket))
        with httpx.Client(transport=transport, base_url="http://edge") as client:
            headers = {"authorization": f"Bearer {token}"}
            path = "/v1/rollouts/m"
            answer = (
                client.get(path, headers=headers)
                if body is None
                else client.post(path, headers=headers, json=body)
            )
        return answer.status_code, answer.json()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="falaj-r-", dir="/tmp") as short, listener() as ray_port:
        known = dataclasses.replace(record(tmp_path, "", ray_port), cluster_id="test", temp_dir=short)
        write_record(known, StorageConfig(root=str(tmp_path)))
        yield Cluster(tmp_path, Path(known.rollouts_socket))


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[subprocess.Popen[str]]:
    process = cluster.start()
    try:
        wait_until(lambda: answers(cluster), seconds=60)
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def answers(cluster: Cluster) -> bool:
    try:
        return cluster.call()[0] == 200
    except httpx.TransportError:
        return False


def test_process_decides_answers_and_ends(cluster: Cluster) -> None:
    """It records the first verdict, does what a caller asks, and ends by SIGTERM.

    After kill -9, the next one goes on.
    """
    with running(cluster) as first:
        wait_until(lambda: cluster.ledger.last(PolicyDecided) is not None)
        status, shown = cluster.call()
        assert (status, shown["policy"]["now"]["verdict"]) == (200, "continue")
        second = cluster.start()
        assert second.wait(60) == 2
        assert second.stderr is not None
        assert "Another controller of rollouts" in second.stderr.read()
        second.stderr.close()
        first.send_signal(signal.SIGKILL)
        first.wait()
    with running(cluster) as next_one:
        assert cluster.call({"action": "abort", "reason": "enough"})[0] == 200
        assert cluster.ledger.last(RolloutRolledBack) is not None
        next_one.terminate()
        assert next_one.wait(20) == 0
    assert len(list(cluster.ledger.entries(PolicyDecided))) == 1
