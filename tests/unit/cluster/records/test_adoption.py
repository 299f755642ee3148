"""A log's table that an older release kept on one machine's disk is moved to the shared storage root."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.records import compaction
from cluster.records.compaction import compact
from cluster.records.progress import BEGINNING, log_age
from cluster.records.table import LogTable
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.storage import list_files
from tests.samples.record_log import fill, ids, run
from tests.servers.shared_logs import Killed, Node, SharedLogs


def old_node(logs: SharedLogs) -> Node:
    """Return a node with a local table of 12 records."""
    node = logs.node("node")
    fill(node.log.folder, logs.keyring)
    run(node.log.folder, logs.keyring)
    assert (node.log.folder / "table").exists()
    return node


@pytest.mark.parametrize("is_half_removed", [False, True])
def test_local_table_of_an_older_release_is_moved(
    logs: SharedLogs, monkeypatch: pytest.MonkeyPatch, is_half_removed: bool
) -> None:
    """Also after a kill that left a part of the folder. The table is encrypted, and the uploader has no key."""
    node, other = old_node(logs), logs.node("other")
    node.write(12, 1)
    rmtree = shutil.rmtree

    def killed(path: Path, **_: Any) -> None:
        if is_half_removed:
            rmtree(Path(path) / "_delta_log")
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        node.uploader().run_once()
    monkeypatch.undo()
    assert node.uploader().run_once().failures == []
    assert ids(other.log, logs.keyring) == [f"p{number}" for number in sorted(range(13), key=str)]
    assert [path.name for path in node.log.folder.glob("table*")] == []
    assert LogTable(other.log.root).records == 12
    assert list_files(f"{other.log.root}/table/_delta_log")


def test_compaction_goes_on_after_a_killed_adoption(
    logs: SharedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copied files have no commit, and their records are on the disk of the other node only."""
    node, other = old_node(logs), logs.node("other")

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(LogTable, "commit", killed)
    with pytest.raises(Killed):
        node.uploader().run_once()
    monkeypatch.undo()
    monkeypatch.setattr(compaction, "ABANDONED_S", -3600.0)
    other.write(12, 1)
    other.uploader().run_once()
    assert compact(other.log, store=logs.keyring, files=ProtectedFiles(logs.keyring)) == 1
    assert node.uploader().run_once().failures == []
    assert len(ids(other.log, logs.keyring)) == 13
    assert list_files(f"{other.log.root}/table/_adopting") == []


def test_age_says_that_the_local_table_is_not_read_yet(logs: SharedLogs) -> None:
    """A reader on the same machine does not see its records, whether the node has reported or not."""
    node = old_node(logs)
    assert log_age(node.log).until == BEGINNING
    node.uploader().announce()
    assert log_age(node.log).until == log_age(logs.node("other").log).until == BEGINNING
    node.uploader().run_once()
    assert log_age(node.log).until > BEGINNING
