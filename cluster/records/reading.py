"""A log as one, whether its records lie in segments yet or in the table.

A compaction may run beside a reader. Segments are listed before the table is opened, and a segment is deleted only
when its records are in the table: so what is listed is in the table, or still there, or was deleted since, and then a
newer version of the table has it. Each record is given once, and none that was there at the beginning is missed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import polars as pl

from cluster.errors import RecordLogCorrupt
from cluster.records.schema import SHADOW
from cluster.records.segments import count_segment, segment_records, segments
from cluster.records.table import LogTable
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.store import KeyStore


def read_records(folder: Path, store: KeyStore) -> Iterator[dict[str, Any]]:
    """All whole records of a log; of each segment in their order.

    Raises:
        RecordLogCorrupt, ProtectedFileCorrupt: a record was altered, moved or taken out, or a file is under a key that
            is none of this log's, naming the file.
        AccessDenied, KeyRevoked: as the key store says.
    """
    return (record for _, _, record in _placed(folder, store))


def _placed(folder: Path, store: KeyStore) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Each record with its segment and its place there."""
    listed = segments(folder)
    table, files = LogTable(folder), ProtectedFiles(store)
    read: set[str] = set()
    given: set[str] = set()
    while True:
        for file in table.files:
            if file.path not in read:
                yield from (one for one in table.read(file, files) if one[0] not in given)
                read.add(file.path)
        deleted = None
        for path in listed:
            if path.stem in given or table.has(path.stem):
                continue
            try:
                for number, record in enumerate(segment_records(path, store)):
                    yield path.stem, number, record
            except FileNotFoundError:
                deleted = path
                break
            given.add(path.stem)
        if deleted is None:
            return
        table = LogTable(folder)
        if not table.has(deleted.stem):
            raise RecordLogCorrupt(
                f"{deleted} was deleted while it was read, and is not in the table. Restore it from a backup."
            )


def count_records(folder: Path) -> int:
    """The number of whole records of a log; needs no key."""
    while True:
        listed, table = segments(folder), LogTable(folder)
        try:
            return table.records + sum(count_segment(path) for path in listed if not table.has(path.stem))
        except FileNotFoundError:  # a compaction has just deleted it, so it is in the table now
            continue


def read_predictions(folder: Path, store: KeyStore) -> pl.DataFrame:
    """The `answers` of `read_log`; raises as `read_records`."""
    return read_log(folder, store).answers


def read_shadow_predictions(folder: Path, store: KeyStore) -> pl.DataFrame:
    """What shadows predicted, as `read_predictions` gives the others; `request_id` is that of the answer beside it."""
    return _log(one for one in _in_order(folder, store) if one["arm"] == SHADOW).answers


def read_log(folder: Path, store: KeyStore) -> Log:
    """What a model was asked and what it answered, in the order in which it was written; raises as `read_records`.

    What a shadow predicted is left out: nobody was answered with it, so it is in no figure of what was served.
    """
    return _log(one for one in _in_order(folder, store) if one["arm"] != SHADOW)


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """A model's log as two frames, each with a row for each entity of a request.

    Columns of both: prediction_id, row, request_id, time and as_of (UTC), model, version, variant, rollout, arm,
    unit_hash.
    """

    answers: pl.DataFrame
    """With those of `probability`, `label`, `value`, `probabilities` that the task has, and every model input by its
    name. Values are as they were written: a column of several types is `pl.Object`, and so is `probabilities`, a dict
    by class. `cluster.records.typed` reads them by a version's signature. Inputs in `TAKEN` are left out."""
    failures: pl.DataFrame
    """Rows that the model gave no finite score for, with the reason as `fault`. They are in no figure."""


def _log(records: Iterable[dict[str, Any]]) -> Log:
    answered: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for record in records:
        head = {name: record.get(name) for name in _HEAD}
        for row in range(max(len(record["predictions"]), len(record["entities"]))):
            fault = fault_of(record, row)
            if fault:
                failed.append(head | {"row": row, "fault": fault})
            else:
                features = record["features"].items()
                inputs = {name: values[row] for name, values in features if name not in TAKEN}
                answered.append(head | {"row": row} | record["predictions"][row] | inputs)
    return Log(answers=_frame(answered, _HEAD), failures=_frame(failed, _HEAD | {"fault": pl.String}))


def read_outcomes(folder: Path, store: KeyStore) -> pl.DataFrame:
    """The last received outcome per prediction and row: prediction_id, row, outcome, observed_at, received_at (UTC).

    Of two that were received in the same instant, the one that was written last counts. An outcome is as it was sent,
    whatever the others are. Raises as `read_records`.
    """
    return _received(folder, store).unique(["prediction_id", "row"], keep="last", maintain_order=True)


def all_outcomes(folder: Path, store: KeyStore) -> Iterator[Outcome]:
    """All outcomes as they were received, the last ones last; raises as `read_records`."""
    frame = _received(folder, store)
    names = ("prediction_id", "row", "outcome")
    for prediction_id, row, value in zip(*(frame[name].to_list() for name in names), strict=True):
        yield Outcome(prediction_id, row, value)


def _received(folder: Path, store: KeyStore) -> pl.DataFrame:
    """All outcomes in the order in which they were received; of a model that has none yet, the columns alone."""
    records = _in_order(folder, store)
    if not records:
        return pl.DataFrame(schema=_OUTCOME | {"outcome": pl.Null})
    return _frame(records, _OUTCOME).sort("received_at", maintain_order=True)


class Outcome(NamedTuple):
    """What somebody says came true."""

    prediction_id: str
    row: int
    value: Any


def fault_of(record: Mapping[str, Any], row: int) -> str:
    """Why a row of a record has no answer; empty for one that has. A release that did not check scores wrote a NaN as
    null, beside a label that means nothing."""
    if fault := record.get("fault"):
        return str(fault)
    if row >= len(record["predictions"]):
        return "no answer"
    return "no finite score" if _is_unscored(record["predictions"][row]) else ""


def _is_unscored(prediction: Mapping[str, Any]) -> bool:
    scores = [prediction.get("probability", 0), prediction.get("value", 0)]
    return None in scores or None in (prediction.get("probabilities") or {}).values()


def is_faulty(record: Mapping[str, Any]) -> bool:
    """Whether a row of a record has no answer."""
    return bool(record.get("fault")) or any(map(_is_unscored, record.get("predictions", ())))


_TIME = pl.Datetime("us", "UTC")
_HEAD: dict[str, Any] = {
    "prediction_id": pl.String,
    "request_id": pl.String,
    "time": _TIME,
    "model": pl.String,
    "version": pl.Int64,
    "variant": pl.String,
    "rollout": pl.String,
    "arm": pl.String,
    "unit_hash": pl.String,
    "as_of": _TIME,
}
"""Columns whose type is the same for all models and versions."""
OUTCOME, ODD = "outcome", "odd_outcome"
TAKEN = frozenset({*_HEAD, "row", "probability", "label", "value", "probabilities", "fault", OUTCOME, ODD})
"""Columns that a frame has for itself. An input of such a name is left out, because a client chooses its value: it must
not say which arm or label an answer was of."""
_OUTCOME: dict[str, Any] = {
    "prediction_id": pl.String,
    "row": pl.Int64,
    "observed_at": _TIME,
    "received_at": _TIME,
}
_NATIVE: dict[frozenset[type], Any] = {
    frozenset({bool}): pl.Boolean,
    frozenset({int}): pl.Int64,
    frozenset({float}): pl.Float64,
    frozenset({str}): pl.String,
}


def _in_order(folder: Path, store: KeyStore) -> list[dict[str, Any]]:
    """By segment and place, so that frames do not depend on what was compacted."""
    placed = sorted(_placed(folder, store), key=lambda one: one[:2])
    return [record for _, _, record in placed]


def _frame(rows: Sequence[Mapping[str, Any]], types: Mapping[str, Any]) -> pl.DataFrame:
    """A frame whose columns beyond those of a stated type hold what was written, and nothing that was made of it."""
    if not rows:
        return pl.DataFrame(schema=dict(types))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pl.DataFrame([_column(name, values, types.get(name)) for name, values in columns.items()])


def _column(name: str, values: list[Any], dtype: Any) -> pl.Series:
    if dtype == _TIME:
        return pl.Series(name, [_moment(value) for value in values], dtype=_TIME)
    if dtype is not None:
        return pl.Series(name, values, dtype=dtype, strict=False)
    return exact_column(name, values)


def exact_column(name: str, values: Sequence[Any]) -> pl.Series:
    """Values as they are: of the type that all have, or of none (`pl.Object`)."""
    found = frozenset(map(type, values)) - {NoneType}
    try:
        return pl.Series(name, values, dtype=_NATIVE.get(found, pl.Object) if found else pl.Null)
    except (OverflowError, TypeError):  # beyond 64 bits, as an older release may have logged it
        return pl.Series(name, values, dtype=pl.Object)


def _moment(text: Any) -> dt.datetime | None:
    """None for what is no moment: one of them must not make the others unreadable."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
