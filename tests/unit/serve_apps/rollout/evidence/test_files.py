"""How the reader treats files: cut lines, backlogs, bounds, removal and a full disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from serve_apps.rollout.evidence import collecting
from serve_apps.rollout.evidence.access_files import Rotation, new_file
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from tests.samples.access_records import ROLLOUT_ID, line
from tests.samples.rollout_evidence import START_MS, Node, evidence, failures
from tests.servers.small_disk import fill_disk, mounted_small_disk


def test_a_line_is_read_when_it_is_complete(store: EvidenceStore, node: Node) -> None:
    """While HAProxy holds the file, the rest of a line may come. After its end, a cut line is broken."""
    text = line(status=500)
    with new_file(node.folder) as file:
        file.write(text[:50])
        file.flush()
        assert node.reader.collect().records == 0
        file.write(text[50:] + b'{"cut')
        file.flush()
        collected = node.reader.collect()
        assert (collected.records, collected.broken) == (1, 0)
    collected = node.reader.collect()
    assert (collected.records, collected.broken, collected.behind_bytes) == (0, 1, 0)
    assert failures(store) == (1, 0)


def test_broken_lines_are_counted_and_the_rest_is_read(store: EvidenceStore, node: Node) -> None:
    """Such as those that a full disk cuts. A huge line without an end does not stop the reader."""
    node.write(line(status=500)[:70], line(), b"\xff\xfe\n", line(status=500))
    collected = node.reader.collect()
    assert (collected.records, collected.broken) == (1, 2)
    node.write(b"x" * 20_000, b"\n", line(status=500, unit_hash="B" * 16))
    assert [node.reader.collect(max_bytes=10_000).broken for _ in range(4)] == [1, 1, 1, 0]
    assert failures(store) == (2, 0)


def test_a_pass_reads_a_bounded_number_of_bytes(store: EvidenceStore, node: Node) -> None:
    """The next passes read the rest, in all files."""
    for name in ("20270115T080000-a.jsonl", "20270116T080000-b.jsonl"):
        node.write(*(line(unit_hash=f"{name[7]}{unit:015}") for unit in range(50)), name=name)
    size = len(line())
    numbers = [node.reader.collect(max_bytes=20 * size + 7).records for _ in range(8)]
    assert (numbers[0], sum(numbers), numbers[-1]) == (20, 100, 0)
    assert evidence(store).watched_units == 100


def test_the_newest_records_do_not_wait_for_a_backlog(store: EvidenceStore, node: Node) -> None:
    """Such as after an outage of the database. The breaker still sees the last requests, and the champion's since."""
    backlog = [line(status=500, unit_hash=f"{unit:016}", ended_ms=START_MS + unit) for unit in range(50)]
    node.write(*backlog, line(arm="control", ended_ms=START_MS), name="20270115T080000-a.jsonl")
    newest = [line(unit_hash=f"N{unit:015}", ended_ms=START_MS + 9_000) for unit in range(20)]
    node.write(*newest, name="20270116T080000-b.jsonl")
    size = sum(map(len, newest))
    assert node.reader.collect(max_bytes=size).records == 20
    before = evidence(store).last
    while node.reader.collect(max_bytes=size).records:
        pass
    assert failures(store) == (50, 0)
    assert evidence(store).last == before
    assert (before.requests, before.failures, before.champion_requests) == (20, 0, 0)


def test_known_units_are_bounded(store: EvidenceStore, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that was forgotten is stored again, which changes nothing."""
    monkeypatch.setattr(collecting, "MAX_KNOWN", 5)
    for number in range(3):
        node.write(*(line(unit_hash=f"{unit:016}", ended_ms=START_MS + number) for unit in range(20)))
        node.reader.collect()
    state = node.reader._state
    assert state is not None
    assert len(state.known._below) == 5
    assert evidence(store).watched_units == 20


def test_files_are_removed_when_they_were_counted_and_are_old(ledger: Ledger, tmp_path: Path) -> None:
    """Neither a file that was not read to its end, nor one of a running HAProxy, nor a young one is removed."""
    node = Node(ledger, tmp_path / "access", rotation=Rotation(retention_s=3600))
    names = ["20270115T080000-a.jsonl", "20270116T080000-b.jsonl", "20270117T080000-c.jsonl"]
    for name in names:
        node.write(line(), line(), name=name)
    old = time.time() - 7200
    for name in names[:2]:
        os.utime(node.folder / name, (old, old))
    with new_file(node.folder) as running:
        running.write(line())
        running.flush()
        os.utime(running.name, (old, old))
        assert [node.reader.collect(max_bytes=1).removed for _ in range(2)] == [(), ()]
        assert node.reader.collect().removed == ()
        assert node.reader.collect().removed == (names[0], names[1])
        assert node.reader.collect().removed == ()
        left = {path.name for path in node.folder.iterdir()}
        assert left == {names[2], Path(running.name).name}
    assert set(node.state().files) == left
    (node.folder / names[2]).rename(tmp_path / "moved.jsonl")
    node.reader.collect()
    assert names[2] not in node.state().files


def test_full_disk_loses_no_count(tmp_path: Path) -> None:
    """While the database cannot be written, records stay in their files; they are counted later."""
    with mounted_small_disk(tmp_path / "disk") as disk:
        ledger = Ledger(f"sqlite:///{disk}/ledger.db")
        store = EvidenceStore(ledger.engine)
        store.register(ROLLOUT_ID, Counting())
        node = Node(ledger, tmp_path / "access")
        node.write(*(line(status=500, unit_hash=f"{unit:016}") for unit in range(20_000)))
        fill_disk(disk / "rest")
        with pytest.raises(sa.exc.DBAPIError):
            node.reader.collect(max_bytes=2**24)
        (disk / "rest").unlink()
        node.reader.collect(max_bytes=2**24)
        assert failures(store) == (20_000, 0)
        ledger.close()
