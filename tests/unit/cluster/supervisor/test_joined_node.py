"""Tests of the supervisor's part on a node that joined."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.node.description import describe_machine
from cluster.node.parts import Part, State
from cluster.security.keys.store import KeyStoreUnavailable
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig, StorageConfig
from cluster.supervisor import machine
from cluster.supervisor.machine import JoinedNode, Reporter

SESSION = "session_2026-11-30_04-00-00_000000_1"


class Head:
    """A head that answers with its session, or not at all."""

    def __init__(self) -> None:
        self.session = SESSION
        self.reports: list[object] = []
        self.reported = threading.Event()

    def request(self, operation: str, *, parts: dict[str, str]) -> object:
        """Answer a report."""
        self.reports.append(parts)
        self.reported.set()
        if not self.session:
            raise KeyStoreUnavailable("no answer")
        return {"session": self.session}


@pytest.fixture
def record(tmp_path: Path) -> ClusterRecord:
    """Return the record of a node with a Ray session."""
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)))
    record = describe_machine(config, cluster_id="abc", node_id="n", head="127.0.0.1:1")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "session_latest").symlink_to(tmp_path / "ray" / SESSION)
    return replace(record, temp_dir=str(tmp_path / "ray"), runtime_dir=str(tmp_path))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    """Put a double in the place of the connection to the head."""
    head = Head()
    monkeypatch.setattr(machine.HeadClient, "of", lambda record: head)
    return head


def test_ray_starts_anew_when_the_head_has_a_new_session(record: ClusterRecord, head: Head) -> None:
    """A raylet of the old session would never get work again."""
    node = JoinedNode(PlatformConfig(), record)
    assert not node.restore_is_due()
    node.report({})
    assert not node.restore_is_due()
    head.session = SESSION.replace("_1", "_2")
    node.report({})
    assert node.restore_is_due()


def test_missing_link_to_the_session_starts_nothing(record: ClusterRecord, head: Head) -> None:
    """Each of Ray's workers removes the link and makes it again."""
    node = JoinedNode(PlatformConfig(), record)
    node.report({})
    Path(record.temp_dir, "session_latest").unlink()
    assert not node.restore_is_due()


def test_reports_go_on_without_the_head(record: ClusterRecord, head: Head) -> None:
    """The first one is sent at once. A head that does not answer is remembered until it does."""
    stopped = threading.Event()
    reporter = Reporter(
        JoinedNode(PlatformConfig(), record),
        states=lambda: {Part.raylet: State.dead},
        stopped=stopped,
        every_s=0.01,
    )
    head.session = ""
    reporter.start()
    try:
        assert reporter.refused.wait(10)
        head.session = SESSION
        head.reported.clear()
        assert head.reported.wait(10)
        for _ in range(1000):
            if not reporter.refused.is_set():
                break
            stopped.wait(0.01)
        assert not reporter.refused.is_set()
        assert head.reports[0] == {"supervisor": "running", "raylet": "dead"}
    finally:
        stopped.set()
        reporter.join(10)
