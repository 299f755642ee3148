"""Tests of compaction: the log has the same records before and after, each once."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from cluster.errors import CommitConflict, RecordLogCorrupt
from cluster.records.columns import to_record, to_row
from cluster.records.compaction import LOCK
from cluster.records.reading import count_records, read_outcomes, read_predictions, read_records
from cluster.records.segments import SegmentWriter, list_segments
from cluster.records.table import LogTable
from cluster.security.encryption.parquet import ProtectedFileCorrupt, ProtectedFiles
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyRevoked
from tests.samples.record_log import LATER, PERSONAL, fill, ids, outcome, post, prediction, run


def test_compacted_log_reads_the_same(log: Path, keyring: Keyring) -> None:
    """For versions with other inputs and keys of two classes. The segments are deleted."""
    fill(log, keyring)
    frame, records = read_predictions(log, keyring), sorted(read_records(log, keyring), key=str)
    assert run(log, keyring) == 3
    assert run(log, keyring) == 0
    assert list_segments(log) == []
    assert_frame_equal(read_predictions(log, keyring), frame)
    assert sorted(read_records(log, keyring), key=lambda record: record["prediction_id"]) == sorted(
        records, key=lambda record: record["prediction_id"]
    )
    assert count_records(log) == 12
    fill(log, keyring, first=12)
    assert ids(log, keyring) == sorted(f"p{number}" for number in range(24))
    assert count_records(log) == 24


def test_open_segment_is_not_compacted(log: Path, keyring: Keyring) -> None:
    """Closed segments of the same writer are compacted, and the writer continues."""
    writer = SegmentWriter(log, store=keyring, key=PERSONAL, max_bytes=1)
    for number in range(3):
        writer.append(prediction(number))
    assert run(log, keyring) == 2
    assert list_segments(log) == [writer.path]
    writer.append(prediction(3))
    assert run(log, keyring) == 1
    assert ids(log, keyring) == ["p0", "p1", "p2", "p3"]
    assert count_records(log) == 4


def test_segment_without_records_is_deleted(log: Path, keyring: Keyring) -> None:
    """Its writer was killed before the first record, or before the first line was complete."""
    SegmentWriter(log, store=keyring, key=PERSONAL).close()
    SegmentWriter(log, store=keyring, key=PERSONAL).close()
    list_segments(log)[0].write_bytes(b"{")
    assert run(log, keyring) == 2
    assert (list_segments(log), count_records(log), LogTable(log).files) == ([], 0, ())


def test_missing_log_has_nothing_to_compact(log: Path, keyring: Keyring) -> None:
    assert run(log, keyring) == 0
    assert not log.exists()


def test_second_concurrent_compaction_is_refused(log: Path, keyring: Keyring) -> None:
    """It changes nothing."""
    fill(log, keyring)
    with (log / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CommitConflict, match="Another compaction"):
            run(log, keyring)
    assert run(log, keyring) == 3


def test_table_knows_its_segments_after_a_delta_checkpoint(log: Path, keyring: Keyring) -> None:
    """Delta writes a checkpoint every hundred commits, and then no longer reads older commits."""
    fill(log, keyring, segments=2, records=2)
    stems = [path.stem for path in list_segments(log)]
    run(log, keyring)
    DeltaTable(str(log / "table")).create_checkpoint()
    (log / "table" / "_delta_log" / f"{0:020}.json").unlink()
    for number in (4, 8):
        fill(log, keyring, first=number, segments=2, records=2)
        assert run(log, keyring) == 2
    assert all(LogTable(log).has(stem) for stem in stems)
    assert len(ids(log, keyring)) == count_records(log) == 12


@pytest.mark.parametrize("lost", ["folder", "commits", "first commit", "last commit"])
def test_files_of_a_lost_table_are_not_removed(log: Path, keyring: Keyring, lost: str) -> None:
    """This can happen after an incomplete restore. Counting and reading fail too."""
    fill(log, keyring)
    run(log, keyring)
    fill(log, keyring, first=12)
    history = log / "table" / "_delta_log"
    history_copy = log.with_name("copy")
    shutil.copytree(history, history_copy)
    match lost:
        case "folder":
            shutil.rmtree(history)
        case "commits":
            shutil.rmtree(history)
            history.mkdir()
        case _:
            (history / f"{0 if lost == 'first commit' else 1:020}.json").unlink()
    before = set(log.rglob("*"))
    with pytest.raises(RecordLogCorrupt, match=r"Restore .*_delta_log from a backup"):
        run(log, keyring)
    if lost != "last commit":  # without the last commit, the table is at an older, valid version
        with pytest.raises(RecordLogCorrupt, match="cannot be read"):
            count_records(log)
        with pytest.raises(RecordLogCorrupt, match="cannot be read"):
            ids(log, keyring)
    assert set(log.rglob("*")) - {log / LOCK} == before - {log / LOCK}
    shutil.copytree(history_copy, history, dirs_exist_ok=True)
    assert run(log, keyring) == 3
    assert ids(log, keyring) == sorted(f"p{number}" for number in range(24))


def test_deleted_segment_is_reported(log: Path, keyring: Keyring) -> None:
    """Its records are not in the table."""
    fill(log, keyring)
    reader = read_records(log, keyring)
    next(reader)
    list_segments(log)[2].unlink()
    with pytest.raises(RecordLogCorrupt, match="was deleted"):
        list(reader)


def test_changed_segment_stops_the_compaction(log: Path, keyring: Keyring) -> None:
    """All segments stay where they are."""
    fill(log, keyring)
    path = list_segments(log)[1]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\nAAAA\n", 1))
    with pytest.raises(RecordLogCorrupt, match=path.name):
        run(log, keyring)
    assert len(list_segments(log)) == 3
    assert LogTable(log).files == ()


def test_table_files_are_encrypted(log: Path, keyring: Keyring) -> None:
    """Only segment and line are public. Each file has the key of its segments."""
    fill(log, keyring)
    run(log, keyring)
    files = ProtectedFiles(keyring)
    assert {file.column_class for file in LogTable(log).files} == {"personal", "sensitive"}
    for file in LogTable(log).files:
        path = log / "table" / file.path
        content = path.read_bytes()
        for word in (b"champion", b"probability", b"outside"):
            assert word not in content
        keys = files.keys(str(path)).columns
        assert {name for name, key in keys.items() if key is None} == {"segment", "line"}
        assert {key for key in keys.values() if key} == {f"predictions/m/{file.column_class}"}
        assert pq.ParquetFile(path).read(["line"]).num_rows == file.records


def test_swapped_table_file_is_refused(log: Path, keyring: Keyring) -> None:
    """This holds for two files of one table, and for files of two logs."""
    fill(log, keyring)
    run(log, keyring)
    first, second = (log / "table" / file.path for file in LogTable(log).files)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ProtectedFileCorrupt):
        read_predictions(log, keyring)
    first.write_bytes(content)
    moved = log.parent / "other"
    log.rename(moved)
    with pytest.raises(ProtectedFileCorrupt):
        read_predictions(moved, keyring)


@pytest.mark.parametrize("compacted", [False, True])
def test_log_with_a_revoked_key_can_only_be_counted(log: Path, keyring: Keyring, compacted: bool) -> None:
    fill(log, keyring)
    if compacted:
        run(log, keyring)
    keyring.revoke(PERSONAL)
    with pytest.raises(KeyRevoked):
        read_predictions(log, keyring)
    assert count_records(log) == 12


@pytest.mark.parametrize("compacted", range(8), ids="compacted after {:03b}".format)
def test_last_received_outcome_counts_whatever_is_compacted(
    log: Path, outcomes: Path, keyring: Keyring, compacted: int
) -> None:
    """The order of writing does not matter."""
    steps: list[Callable[[], None]] = [
        lambda: post(outcomes, keyring, outcome(0, "no"), outcome(1, "no", LATER), outcome(1, "yes", row=1)),
        lambda: post(outcomes, keyring, outcome(0, "yes", LATER), outcome(1, "yes")),
        lambda: post(outcomes, keyring, outcome(0, "yes", LATER), outcome(9, 1.5), outcome(77, "of nothing")),
    ]
    for number, step in enumerate(steps):
        step()
        if number == 1:
            fill(log, keyring)
        if compacted >> number & 1:
            run(log, keyring)
            run(outcomes, keyring)
    known = read_outcomes(outcomes, keyring)
    joined = read_predictions(log, keyring).join(known, on=["prediction_id", "row"], how="inner")
    outcomes_by_row = joined.sort("prediction_id", "row").select("prediction_id", "row", "outcome")
    assert outcomes_by_row.rows() == [("p0", 0, "yes"), ("p1", 0, "no"), ("p1", 1, "yes"), ("p9", 0, 1.5)]
    assert count_records(outcomes) == 8


def test_of_two_outcomes_received_at_the_same_time_the_last_written_counts(
    outcomes: Path, keyring: Keyring
) -> None:
    post(outcomes, keyring, outcome(1, "no"), outcome(1, "yes"))
    for _ in range(2):
        assert read_outcomes(outcomes, keyring)["outcome"].to_list() == ["yes"]
        run(outcomes, keyring)


times = st.datetimes(timezones=st.none()).map(lambda time: f"{time.isoformat()}+00:00")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: "inf" not in repr(value))


names = st.sampled_from(
    ["prediction_id", "time", "version", "row", "outcome", "features", "given", "arm", "later"]
)


@given(st.dictionaries(names, times | values), st.sampled_from(["predictions", "outcomes"]))
def test_record_survives_conversion_to_a_row(record: dict[str, Any], kind: str) -> None:
    """Parts without a column are kept, for example fields of other releases."""
    assert to_record(kind, to_row(kind, "s", 0, record)) == record
