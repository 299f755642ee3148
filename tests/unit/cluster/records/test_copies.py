"""A segment can be in several places during its upload. A reader takes the copy with the most lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.records import contents
from cluster.records.segments import list_segments
from tests.samples.record_log import ids, prediction
from tests.servers.shared_logs import Node, SharedLogs, SharedWriter


def cut_node(logs: SharedLogs) -> tuple[Node, Path]:
    """Return a node whose file lost its last line in a power cut, and the file. The database has both lines."""
    node = logs.node("node")
    replica = SharedWriter(node)
    replica.append(0)
    replica.append(1)
    replica.close()
    [path] = list_segments(node.log.folder)
    path.write_bytes(path.read_bytes()[:-30])
    return node, path


def test_uploaded_copy_is_read_if_it_is_longer_than_the_file(logs: SharedLogs) -> None:
    """Another node uploaded the segment from the database while this one was silent."""
    node, path = cut_node(logs)
    assert logs.node("other").uploader(silent_s=0).run_once().uploaded == 1
    assert path.exists()
    assert ids(node.log, logs.keyring) == ["p0", "p1"]


def test_file_is_read_if_it_is_longer_than_the_uploaded_copy(logs: SharedLogs) -> None:
    """The database did not get its last lines."""
    node = logs.node("node")
    replica = SharedWriter(node)
    replica.append(0)
    writer = replica._writer
    assert logs.node("other").uploader(silent_s=0).run_once().uploaded == 1
    writer.append(prediction(1))
    replica.close()
    assert ids(node.log, logs.keyring) == ["p0", "p1"]


def test_upload_during_the_reading_loses_no_record(logs: SharedLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are removed between the listing and the reading. Their lines are uploaded by then."""
    node, _ = cut_node(logs)
    read_blocks = contents.read_blocks

    def late(*args: object) -> bytes:
        logs.node("other").uploader(silent_s=0).run_once()
        return read_blocks(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(contents, "read_blocks", late)
    assert ids(node.log, logs.keyring) == ["p0", "p1"]
