"""Tests of prediction and outcome records: durable before the answer, complete or absent."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.errors import RecordLogCorrupt
from cluster.records.reading import count_records, read_predictions, read_records
from cluster.records.segments import SegmentWriter
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from tests.samples.record_log import PERSONAL, prediction


@pytest.fixture
def writer(log: Path, keyring: Keyring) -> SegmentWriter:
    return SegmentWriter(log, store=keyring, key=PERSONAL)


def test_each_entity_of_an_answer_is_one_row(log: Path, keyring: Keyring, writer: SegmentWriter) -> None:
    """Two answers with two entities each are two records and four rows."""
    writer.append(prediction(1))
    writer.append(prediction(2))
    frame = read_predictions(log, keyring)
    assert count_records(log) == 2
    assert frame.select("prediction_id", "row").rows() == [("p1", 0), ("p1", 1), ("p2", 0), ("p2", 1)]
    assert frame["age"].to_list() == [41.5, None, 41.5, None]
    assert frame["as_of"].dtype == pl.Datetime("us", "UTC")


def test_incomplete_line_is_skipped(log: Path, keyring: Keyring, writer: SegmentWriter) -> None:
    """Its answer was never sent."""
    writer.append(prediction(1))
    with writer.path.open("ab") as file:
        file.write(base64.b64encode(bytes(100)))
    assert count_records(log) == 1
    assert read_predictions(log, keyring).height == 2


def test_kill_9_after_append_loses_nothing(tmp_path: Path, log: Path, keyring: Keyring) -> None:
    """A process that is killed right after its fifth append leaves five records."""
    program = (
        "import sys; from pathlib import Path; from cluster.records.schema import OutcomeRecord\n"
        "from cluster.records.segments import SegmentWriter\n"
        "from cluster.security.keys.keyring import Keyring\n"
        f"keyring = Keyring(Path({str(tmp_path / 'keyring.json')!r}), bytes(32))\n"
        f"writer = SegmentWriter(Path({str(log)!r}), store=keyring, key={PERSONAL!r})\n"
        "for n in range(5):\n"
        "    writer.append(OutcomeRecord(prediction_id=str(n), outcome=1, observed_at='', received_at=''))\n"
        "print('done', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()
    assert count_records(log) == 5


def test_partly_written_record_is_removed_at_a_real_file_size_limit(
    log: Path, keyring: Keyring, writer: SegmentWriter
) -> None:
    """After the limit is lifted, the log continues as if nothing had happened."""
    writer.append(prediction(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 50, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match=r"took 50 of"):
                writer.append(prediction(2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(OSError, match="too large"):
            writer.append(prediction(2))
        with pytest.raises(OSError, match="took 10 of"):
            SegmentWriter(log, store=keyring, key=PERSONAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(log.iterdir()) == [writer.path]
    writer.append(prediction(4))
    assert read_predictions(log, keyring)["prediction_id"].unique().sort().to_list() == ["p1", "p4"]


def test_new_segment_starts_if_a_partial_record_cannot_be_removed(
    log: Path, keyring: Keyring, writer: SegmentWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line after half a record would make the log unreadable."""
    writer.append(prediction(1))
    before, real_write = writer.path, os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:10]))
    monkeypatch.setattr(os, "ftruncate", lambda *_: os.stat("/nowhere"))
    with pytest.raises(OSError, match="nowhere"):
        writer.append(prediction(2))
    monkeypatch.undo()
    writer.append(prediction(3))
    assert writer.path != before
    assert read_predictions(log, keyring)["prediction_id"].unique().sort().to_list() == ["p1", "p3"]


def is_locked(path: Path) -> bool:
    """Return whether a process writes a segment."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("limits", [{"max_bytes": 1}, {"max_age_s": 0.0}], ids=["large", "old"])
def test_large_or_old_segment_is_replaced(log: Path, keyring: Keyring, limits: dict[str, Any]) -> None:
    """Its lock is released. All segments together are one log, and the key store is used once."""
    writer = SegmentWriter(log, store=keyring, key=PERSONAL, **limits)
    keyring.revoke(PERSONAL)  # a new segment does not use the key store
    for number in range(3):
        writer.append(prediction(number))
    paths = sorted(log.iterdir())
    assert {path.suffix for path in paths} == {".records"}
    assert [path for path in paths if is_locked(path)] == [writer.path]
    assert count_records(log) == 3
    writer.close()
    assert not is_locked(writer.path)


def test_records_are_encrypted(log: Path, writer: SegmentWriter) -> None:
    """Only the key's name and the number of records are visible."""
    writer.append(prediction(1))
    content = writer.path.read_bytes()
    assert PERSONAL.encode() in content
    for word in (b"champion", b"probability", b"outside"):
        assert word not in content
        assert word not in base64.b64decode(content.splitlines()[1])
    assert count_records(log) == 1


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], lines[3]]


def _flipped(lines: list[bytes]) -> list[bytes]:
    data = bytearray(base64.b64decode(lines[2]))
    data[20] ^= 1
    return [*lines[:2], base64.b64encode(data) + b"\n", lines[3]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_swapped, 2),
        (_flipped, 3),
        (lambda lines: [lines[0], lines[1], lines[3]], 3),
        (lambda lines: [lines[0], lines[1], *lines[1:]], 3),
        (lambda lines: [*lines[:2], b"not base64!\n", lines[3]], 3),
    ],
    ids=["swapped", "a bit flipped", "one removed", "one duplicated", "not base64"],
)
def test_changed_log_is_refused_with_file_and_line(
    log: Path,
    keyring: Keyring,
    writer: SegmentWriter,
    change: Callable[[list[bytes]], list[bytes]],
    line: int,
) -> None:
    for number in range(3):
        writer.append(prediction(number))
    writer.path.write_bytes(b"".join(change(writer.path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(RecordLogCorrupt, match=rf"{writer.path.name}, line {line}"):
        read_predictions(log, keyring)


@pytest.mark.parametrize("place", ["predictions/other", "outcomes/m"])
def test_segment_moved_to_another_log_is_refused(
    log: Path, keyring: Keyring, writer: SegmentWriter, tmp_path: Path, place: str
) -> None:
    """To another model's log, or from predictions to outcomes."""
    writer.append(prediction(1))
    elsewhere = tmp_path / place
    elsewhere.mkdir(parents=True)
    writer.path.rename(elsewhere / writer.path.name)
    with pytest.raises(RecordLogCorrupt):
        read_predictions(elsewhere, keyring)


def test_segment_with_incomplete_first_line_is_empty(
    log: Path, keyring: Keyring, writer: SegmentWriter
) -> None:
    header = writer.path.read_bytes()
    for cut in (0, 1, len(header) - 1):
        writer.path.write_bytes(header[:cut])
        assert count_records(log) == 0
        assert list(read_records(log, keyring)) == []


@pytest.mark.parametrize(
    "key",
    ["models/other", "outcomes/m/personal", "predictions/other/personal", "predictions/m", "predictions/m/x"],
)
def test_segment_with_a_key_of_another_log_is_refused(log: Path, keyring: Keyring, key: str) -> None:
    """The segment names its key itself. A principal with another key could otherwise add forged records."""
    keyring.ensure(KeyInfo(name=key))
    writer = SegmentWriter(log, store=keyring, key=key)
    writer.append(prediction(1))
    with pytest.raises(RecordLogCorrupt, match="does not belong to this log"):
        read_predictions(log, keyring)


@pytest.mark.parametrize("name", [None, 3, [], "", "../predictions/m/personal"])
def test_segment_without_a_valid_key_name_is_refused(
    log: Path, keyring: Keyring, writer: SegmentWriter, name: object
) -> None:
    head, *rest = writer.path.read_bytes().splitlines(keepends=True)
    stated = json.loads(head) | {"key": name}
    writer.path.write_bytes(json.dumps(stated).encode() + b"\n" + b"".join(rest))
    with pytest.raises(RecordLogCorrupt, match="does not belong to this log"):
        list(read_records(log, keyring))


def test_closed_writer_does_not_write_to_another_file(
    log: Path, keyring: Keyring, writer: SegmentWriter
) -> None:
    """The kernel reuses the number of its file descriptor."""
    writer.append(prediction(1))
    writer.close()
    with (log.parent / "other").open("wb") as other:
        writer.append(prediction(2))
        assert other.tell() == os.fstat(other.fileno()).st_size == 0
    assert count_records(log) == 2
    writer.close()
