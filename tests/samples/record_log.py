"""Logs of predictions and outcomes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cluster.records.compaction import compact
from cluster.records.reading import read_records
from cluster.records.schema import OutcomeRecord, PredictionRecord
from cluster.records.segments import SegmentWriter
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo

PERSONAL, SENSITIVE, OUTCOMES = "predictions/m/personal", "predictions/m/sensitive", "outcomes/m/sensitive"
TIME = "2026-01-02T03:04:05.000006+00:00"
LATER = "2026-01-03T00:00:00+00:00"
FLAGS = ModelSignature(
    task=Task.binary, inputs=(InputSpec(name="x", dtype="int64"),), label="y", classes=(False, True)
)


def prediction(number: int, *, version: int = 1, **changes: Any) -> PredictionRecord:
    """Return the record of one prediction. The two model versions have different inputs."""
    features = {"age": [41.5, None]} if version == 1 else {"city": ["a", "b"]}
    record = PredictionRecord(
        prediction_id=f"p{number}",
        request_id=f"r{number}",
        time=TIME,
        model="m",
        version=version,
        variant="champion",
        rollout="",
        arm="outside",
        unit_hash="",
        as_of="0001-01-01T00:00:00+00:00",
        entities=[{"id": 1}, {"id": "two"}],
        features=features,
        predictions=[{"probability": 0.25, "label": "no"}, {"probability": 0.75, "label": "yes"}],
        given=["age"],
    )
    return dataclasses.replace(record, **changes)


def answer(number: int, *values: Any, version: int = 1, name: str = "x", **changes: Any) -> PredictionRecord:
    """Return the record of a prediction with one input. It has a row for each value."""
    rows = {
        "entities": [{"id": row} for row in range(len(values))],
        "features": {name: list(values)},
        "predictions": [{"probability": 0.75, "label": True} for _ in values],
    }
    return prediction(number, version=version, **rows | changes)


def outcome(number: int, value: Any, received_at: str = TIME, row: int = 0) -> OutcomeRecord:
    return OutcomeRecord(
        prediction_id=f"p{number}", row=row, outcome=value, observed_at=TIME, received_at=received_at
    )


def new_keyring(root: Path) -> Keyring:
    keyring = Keyring.create(root / "keyring.json", bytes(32))
    for name in (PERSONAL, SENSITIVE, OUTCOMES):
        keyring.ensure(KeyInfo(name=name))
    return keyring


def fill(log: Path, keyring: Keyring, *, first: int = 0, segments: int = 3, records: int = 4) -> None:
    """Write closed segments of two model versions. Their keys have two different column classes."""
    number = first
    for segment in range(segments):
        writer = SegmentWriter(log, store=keyring, key=SENSITIVE if segment % 2 else PERSONAL)
        for _ in range(records):
            writer.append(prediction(number, version=1 + segment % 2))
            number += 1
        writer.close()


def run(log: Path, keyring: Keyring) -> int:
    return compact(log, store=keyring, files=ProtectedFiles(keyring))


def post(log: Path, keyring: Keyring, *records: OutcomeRecord) -> None:
    """Write records like a replica that then ends."""
    writer = SegmentWriter(log, store=keyring, key=OUTCOMES)
    writer.append(*records)
    writer.close()


def ids(log: Path, keyring: Keyring) -> list[str]:
    return sorted(record["prediction_id"] for record in read_records(log, keyring))
