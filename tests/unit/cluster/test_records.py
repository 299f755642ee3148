"""Prediction and outcome records: durable before the answer, whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from cluster.records import (
    OutcomeRecord,
    PredictionRecord,
    SegmentWriter,
    count_predictions,
    read_outcomes,
    read_predictions,
)


def prediction(number: int) -> PredictionRecord:
    return PredictionRecord(
        prediction_id=f"p{number}",
        request_id=f"r{number}",
        time="2026-01-02T03:04:05.000006+00:00",
        model="m",
        version=1,
        variant="champion",
        rollout="",
        arm="outside",
        unit_hash="",
        as_of="2016-12-31T00:00:00+00:00",
        entities=[{"id": 1}, {"id": 2}],
        features={"person__AGEP": [41.0, None]},
        predictions=[{"probability": 0.25, "label": 0}, {"probability": 0.75, "label": 1}],
    )


def outcome(prediction_id: str, value: int, received_at: str) -> OutcomeRecord:
    return OutcomeRecord(
        prediction_id=prediction_id,
        outcome=value,
        observed_at="2017-01-01T00:00:00Z",
        received_at=received_at,
    )


def test_each_entity_of_an_answer_is_one_row(tmp_path: Path) -> None:
    """Two answers with two entities each are two records and four rows."""
    writer = SegmentWriter(tmp_path)
    writer.append(prediction(1))
    writer.append(prediction(2))
    frame = read_predictions(tmp_path)
    assert count_predictions(tmp_path) == 2
    assert frame.select("prediction_id", "row").rows() == [("p1", 0), ("p1", 1), ("p2", 0), ("p2", 1)]
    assert frame["person__AGEP"].to_list() == [41.0, None, 41.0, None]
    assert frame["as_of"].dtype == pl.Datetime("us", "UTC")


def test_the_last_received_outcome_counts(tmp_path: Path) -> None:
    """An outcome sent twice or corrected later stands once."""
    writer = SegmentWriter(tmp_path)
    writer.append(outcome("p1", 0, "2026-01-01T00:00:00Z"), outcome("p2", 1, "2026-01-01T00:00:00Z"))
    writer.append(outcome("p1", 1, "2026-01-02T00:00:00Z"))
    frame = read_outcomes(tmp_path).sort("prediction_id")
    assert frame["outcome"].to_list() == [1, 1]


def test_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    """Half a record belongs to an answer that never left."""
    writer = SegmentWriter(tmp_path)
    writer.append(prediction(1))
    with writer.path.open("ab") as file:
        file.write(b'{"prediction_id":"half')
    assert count_predictions(tmp_path) == 1


def test_kill_9_after_append_loses_nothing(tmp_path: Path) -> None:
    """A process that is killed right after its fifth append has left five records."""
    program = (
        "import sys; from pathlib import Path; from cluster.records import OutcomeRecord, SegmentWriter\n"
        f"writer = SegmentWriter(Path({str(tmp_path)!r}))\n"
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
    assert count_predictions(tmp_path) == 5


def test_a_full_disk_is_an_error_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk takes only part of a record, that part is removed and the caller hears of it."""
    writer = SegmentWriter(tmp_path)
    writer.append(prediction(1))
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:10]))
    with pytest.raises(OSError, match="took 10 of"):
        writer.append(prediction(2))
    monkeypatch.undo()
    writer.append(prediction(3))
    assert [row["prediction_id"] for row in read_predictions(tmp_path).iter_rows(named=True)] == [
        "p1",
        "p1",
        "p3",
        "p3",
    ]
