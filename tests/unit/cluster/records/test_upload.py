"""Tests of logs in an object store: uploads, kills of the uploader, and readers and compactions at the same time."""

from __future__ import annotations

import datetime as dt
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CommitConflict, ConfigError, Inconsistent
from cluster.records import upload
from cluster.records.blocks import Block, BlockWriter, SegmentSealed, segment_sizes
from cluster.records.compaction import LOCK, compact
from cluster.records.contents import list_shared
from cluster.records.nodes import describe, require_silent, wait_until_complete
from cluster.records.progress import forget, log_age, read_progress
from cluster.records.reading import count_records, read_records
from cluster.records.segments import list_segments
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.keyring import Keyring
from cluster.storage import create_bytes, read_bytes, write_bytes
from tests.samples.record_log import ids, prediction
from tests.servers.shared_logs import Killed, Node, SharedLogs, SharedWriter
from tests.servers.small_disk import fill_disk, mounted_small_disk


def names(*numbers: int) -> list[str]:
    return sorted(f"p{number}" for number in numbers)


def compacted(node: Node) -> int:
    return compact(node.log, store=node.keyring, files=ProtectedFiles(node.keyring))


def test_closed_segment_is_uploaded_and_read_on_every_node(logs: SharedLogs) -> None:
    """The open segment stays on its node's disk. A compaction on any node moves the uploaded segments to the table."""
    first, second = logs.node("first"), logs.node("second")
    first.write(0, 3)
    opened = first.writer()
    opened.append(prediction(3))
    done = first.uploader().run_once()
    assert (done.uploaded, done.failures) == (1, [])
    assert list_segments(first.log.folder) == [opened.path]
    assert ids(first.log, logs.keyring) == names(0, 1, 2, 3)
    assert ids(second.log, logs.keyring) == names(0, 1, 2)
    assert compacted(second) == 1
    assert list_shared(first.log) == []
    opened.close()
    first.uploader().run_once()
    assert list_segments(first.log.folder) == []
    for node in (first, second):
        assert ids(node.log, logs.keyring) == names(0, 1, 2, 3)
        assert count_records(node.log) == 4
    assert compacted(first) == 1
    assert ids(second.log, logs.keyring) == names(0, 1, 2, 3)
    assert not (first.log.folder / "table").exists()


STEPS: tuple[tuple[Any, str], ...] = (
    (upload, "seal"),
    (upload, "create_bytes"),
    (upload, "read_bytes"),
    (upload, "remove_blocks"),
    (Path, "unlink"),
    (upload, "report"),
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[step for _, step in STEPS])
def test_kill_of_the_uploader_loses_and_doubles_nothing(
    logs: SharedLogs, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, after: bool
) -> None:
    """Before or after any step, for a segment with blocks and one without. The next round finishes the work."""
    node, other = logs.node("node"), logs.node("other")
    replica = SharedWriter(node)
    replica.append(0, 1)
    replica.append(2)
    node.write(3, 2)
    replica.close()
    function = getattr(owner, step)

    def killed(*args: Any, **options: Any) -> None:
        if after:
            function(*args, **options)
        raise Killed

    monkeypatch.setattr(owner, step, killed)
    with pytest.raises(Killed):
        node.uploader().run_once()
    monkeypatch.undo()
    assert ids(node.log, logs.keyring) == names(*range(5))
    assert count_records(node.log) == 5
    assert set(ids(other.log, logs.keyring)) >= set(names(0, 1, 2))
    assert node.uploader().run_once().failures == []
    assert list_segments(node.log.folder) == []
    assert segment_sizes(other.ledger.engine, other.log.name) == {}
    assert ids(other.log, logs.keyring) == names(*range(5))


def test_two_uploaders_do_no_harm(logs: SharedLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both create the same file. One of them finds it there, with the same content."""
    node = logs.node("node")
    for first in range(0, 20, 2):
        node.write(first, 2)
    results: list[bool] = []

    def created(uri: str, data: bytes) -> bool:
        results.append(create_bytes(uri, data) and create_bytes(uri, data))
        return results[-1]

    monkeypatch.setattr(upload, "create_bytes", created)
    with ThreadPoolExecutor(2) as pool:
        rounds = [one.result() for one in [pool.submit(node.uploader().run_once) for _ in range(2)]]
    assert [one.failures for one in rounds] == [[], []]
    assert not any(results)
    assert ids(node.log, logs.keyring) == names(*range(20))
    assert len(list_shared(node.log)) == 10


def test_file_with_other_content_is_never_overwritten(logs: SharedLogs) -> None:
    """The segment stays on the disk, and the node's progress stays before it."""
    node, other = logs.node("node"), logs.node("other")
    node.write(0, 2)
    [path] = list_segments(node.log.folder)
    uri = f"{node.log.shared}/{path.name}"
    write_bytes(uri, b"another\nfile\n")
    [failure] = node.uploader().run_once().failures
    assert "exists with other content" in failure
    assert path.exists()
    assert read_bytes(uri) == b"another\nfile\n"
    assert (log_age(other.log).last, len(log_age(other.log).nodes)) == (node.uploader().node, 2)


def test_reader_sees_each_record_once_during_uploads_and_compactions(logs: SharedLogs) -> None:
    """Uploads and a compaction happen after each record that the reader has got."""
    node = logs.node("node")
    replica = SharedWriter(node)
    replica.append(0)
    for number in range(1, 12, 2):
        node.write(number, 2)
    for position in (0, 2, 5, 11):
        reader = read_records(node.log, logs.keyring)
        read = [next(reader)["prediction_id"] for _ in range(position)]
        node.uploader().run_once()
        compacted(node)
        read += [record["prediction_id"] for record in reader]
        assert sorted(read) == names(*range(13)), position
        shutil.rmtree(node.log.folder, ignore_errors=True)


def test_blocks_are_read_on_every_node_and_removed_after_the_upload(logs: SharedLogs) -> None:
    """An answered record is readable at once elsewhere, and it is read once although it is in two places."""
    node, other = logs.node("node"), logs.node("other")
    replica = SharedWriter(node)
    replica.append(0)
    replica.append(1, 2)
    for reader in (node, other):
        assert ids(reader.log, logs.keyring) == names(0, 1, 2)
        assert count_records(reader.log) == 3
    assert node.uploader().run_once().uploaded == 0
    age = log_age(other.log)
    assert age.until > dt.datetime.now(dt.UTC) - dt.timedelta(minutes=1)
    replica.close()
    assert node.uploader().run_once().uploaded == 1
    assert segment_sizes(node.ledger.engine, node.log.name) == {}
    assert ids(other.log, logs.keyring) == names(0, 1, 2)


def test_deleted_node_loses_no_answered_record(logs: SharedLogs) -> None:
    """Another node uploads what the database has, when the lost node has been silent."""
    node, other = logs.node("node"), logs.node("other")
    replica = SharedWriter(node)
    replica.append(0, 1)
    replica.append(2)
    node.uploader().run_once()
    replica.close()
    shutil.rmtree(node.places.disk)
    assert ids(other.log, logs.keyring) == names(0, 1, 2)
    assert other.uploader(silent_s=3600).run_once().uploaded == 0
    assert other.uploader(silent_s=0).run_once().uploaded == 1
    assert segment_sizes(other.ledger.engine, other.log.name) == {}
    assert ids(other.log, logs.keyring) == names(0, 1, 2)
    assert len(log_age(other.log).nodes) == 2
    lost = log_age(other.log).last
    forget(other.ledger.engine, lost)
    assert log_age(other.log).last == ""


def test_node_that_was_silent_starts_a_new_segment(logs: SharedLogs) -> None:
    """Its segment was uploaded by another node, so its next record is refused there and goes into a new one."""
    node, other = logs.node("node"), logs.node("other")
    replica = SharedWriter(node)
    replica.append(0)
    assert other.uploader(silent_s=0).run_once().uploaded == 1
    with pytest.raises(SegmentSealed):
        replica.append(1)
    replica.append(2)
    replica.close()
    assert node.uploader().run_once().failures == []
    assert list_segments(node.log.folder) == []
    assert ids(other.log, logs.keyring) == names(0, 2)


def test_database_has_more_lines_than_the_file_after_a_power_cut(logs: SharedLogs) -> None:
    """The file was not flushed. The uploaded segment has the answered records, and an incomplete line is left out."""
    node, other = logs.node("node"), logs.node("other")
    replica = SharedWriter(node)
    replica.append(0)
    replica.append(1)
    replica.close()
    [path] = list_segments(node.log.folder)
    path.write_bytes(path.read_bytes()[:-30])
    assert ids(node.log, logs.keyring) == names(0, 1)
    assert node.uploader().run_once().failures == []
    assert ids(other.log, logs.keyring) == names(0, 1)


def test_adding_a_block_twice_changes_nothing(logs: SharedLogs) -> None:
    """A connection can break after the database has added a block, and before it has said so."""
    node = logs.node("node")
    blocks = BlockWriter(node.log)
    for block in (Block("s", 0, b"head\na\n"), Block("s", 7, b"b\n")):
        for _ in range(2):
            blocks.add([block])
    assert segment_sizes(node.ledger.engine, node.log.name) == {"s": 9}
    with pytest.raises(SegmentSealed):
        blocks.add([Block("other", 5, b"x\n")])


def test_second_compaction_on_another_node_is_refused(logs: SharedLogs) -> None:
    """The lock is in PostgreSQL, because the nodes share no disk."""
    node, other = logs.node("node"), logs.node("other")
    node.write(0, 1)
    node.uploader().run_once()
    refused: list[bool] = []

    class Compacting(ProtectedFiles):
        def write(self, *args: Any, **options: Any) -> int:
            with pytest.raises(CommitConflict, match="is running"):
                compacted(other)
            refused.append(True)
            return super().write(*args, **options)

    assert compact(node.log, store=logs.keyring, files=Compacting(logs.keyring)) == 1
    assert refused == [True]
    assert compacted(other) == 0
    assert (other.log.folder / LOCK).exists()


def test_age_is_the_start_of_the_oldest_segment_that_is_not_shared(logs: SharedLogs) -> None:
    """An open segment without records holds nothing back, and this node's own segments are read from its disk."""
    node, other = logs.node("node"), logs.node("other")
    opened = node.writer()
    node.uploader().run_once()
    before = log_age(other.log).until
    opened.append(prediction(0))
    node.uploader().run_once()
    held_back = log_age(other.log).until
    started = dt.datetime.strptime(opened.path.name[:15], "%Y%m%dT%H%M%S").replace(tzinfo=dt.UTC)
    assert held_back == started
    assert log_age(node.log).until > before
    assert "predictions until" in str(log_age(other.log))
    opened.close()
    node.uploader().run_once()
    assert log_age(other.log).until > before


def test_upload_makes_room_on_a_full_disk(logs: SharedLogs, tmp_path: Path) -> None:
    """The uploader needs no space on the disk, so writers go on after it."""
    with mounted_small_disk(tmp_path / "node"):
        node, other = logs.node("node"), logs.node("other")
        uploader = node.uploader()
        node.write(0, 3)
        fill_disk(tmp_path / "node" / "filler")
        with pytest.raises(OSError, match="No space"):
            node.write(3, 50)
        uploaded = uploader.run_once()
        assert uploaded.failures == []
        assert set(ids(other.log, logs.keyring)) >= set(names(0, 1, 2))
        before = count_records(other.log)
        node.write(100, 1)
        assert uploader.run_once().failures == []
        assert count_records(other.log) == before + 1


def test_one_machine_needs_no_postgresql(servers: tuple[str, str], tmp_path: Path, keyring: Keyring) -> None:
    """With a ledger in SQLite, logs are uploaded and compacted all the same."""
    address = f"sqlite:///{tmp_path}/ledger.db"
    node = SharedLogs(folder=tmp_path, bucket=servers[0], address=address, keyring=keyring).node("node")
    node.write(0, 3)
    assert node.uploader().run_once().uploaded == 1
    assert ids(node.log, keyring) == names(0, 1, 2)
    assert compacted(node) == 1
    assert count_records(node.log) == 3
    assert len(log_age(node.log).nodes) == 1
    node.ledger.close()


def test_node_leaves_after_its_last_upload(logs: SharedLogs) -> None:
    """It still counts while a segment is open, and no more afterwards."""
    node, other = logs.node("node"), logs.node("other")
    writer = node.writer()
    writer.append(prediction(0))
    with pytest.raises(Inconsistent, match="a replica still writes"):
        node.uploader().leave()
    assert log_age(other.log).last == node.uploader().node
    writer.close()
    node.uploader().leave()
    assert ids(other.log, logs.keyring) == names(0)
    assert log_age(other.log).last == ""


def test_nodes_are_shown_and_a_lost_one_is_forgotten(logs: SharedLogs) -> None:
    """A node that reports is not lost."""
    node, other = logs.node("node"), logs.node("other")
    writer = node.writer()
    writer.append(prediction(0))
    node.uploader().run_once()
    other.uploader().run_once()
    reports = read_progress(other.ledger.engine)
    lines = {describe(one) for one in reports}
    assert any("predictions/m until" in line and "other logs until" in line for line in lines)
    assert any("all logs until" in line for line in lines)
    with pytest.raises(ConfigError, match="so its disk is not lost"):
        require_silent(node.uploader().node, reports)
    with pytest.raises(ConfigError, match="No node 'x'"):
        require_silent("x", reports)
    require_silent(node.uploader().node, [replace(one, silent_s=1000) for one in reports])
    writer.close()


def test_command_waits_until_all_nodes_have_shared_their_records(logs: SharedLogs) -> None:
    """Before that, monitoring on one node would miss the newest records of another one."""
    node, other = logs.node("node"), logs.node("other")
    writer = node.writer()
    writer.append(prediction(0))
    for one in (node, other):
        one.uploader().run_once()
    with pytest.raises(Inconsistent, match=rf"had not shared all records.*{node.uploader().node}"):
        wait_until_complete(other.ledger.engine, timeout_s=0)
    writer.close()
    with ThreadPoolExecutor(1) as command:
        waiting = command.submit(wait_until_complete, other.ledger.engine, timeout_s=30)
        while not waiting.done():
            for one in (node, other):
                one.uploader().run_once()
        assert len(waiting.result()) == 2
    assert ids(other.log, logs.keyring) == names(0)
