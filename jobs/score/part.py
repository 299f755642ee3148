"""Score one part of the input: read, add features, predict, write. Runs in the command or in a Ray task."""

from __future__ import annotations

import datetime as dt
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.registry import ModelVersion
from cluster.runtime import Model, Predictions, load_model
from cluster.security.keys.access import KeyAccess, key_store
from feature_jobs.store.types.columns import append_columns
from feature_jobs.store.types.schema import EVENT
from jobs.score.files import FileOfRows, Folder, PartResult, scores_name, set_aside_name, write_result
from jobs.score.inputs import InputPlan, ModelRows, model_rows
from jobs.score.predicting import answer_columns, predict
from jobs.score.reading import Chunk, read_part
from jobs.score.set_aside import Reasons, take
from jobs.score.source import Part, Source

TIME = pa.timestamp("us", "UTC")
PREDICTION_ID, ROW, REASON = "prediction_id", "input_row", "reason"
RESERVED = frozenset(
    {PREDICTION_ID, ROW, REASON, "model", "version", "time", "as_of"}
    | {"probability", "label", "probabilities", "value"}
)
"""Names of the output's own columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How the parts of a run are scored, as plain data that can be sent to workers."""

    run: str
    """First half of each prediction id: 16 hexadecimal digits."""
    version: ModelVersion
    access: KeyAccess
    source: Source
    inputs: InputPlan
    read_columns: tuple[str, ...]
    """Columns of the input to read."""
    kept_columns: tuple[str, ...]
    """Columns of the input to copy."""
    input_columns: tuple[str, ...]
    """Inputs of the model to copy."""
    time: dt.datetime
    """When the run started."""
    folder: Folder
    part_rows: int
    max_bad: int
    """Largest number of rows of the whole input that may be set aside."""
    in_tasks: bool = False


@dataclass(frozen=True, slots=True)
class _ModelKey:
    """Identifies a loaded model in a process."""

    uri: str
    manifest_hash: str
    access: KeyAccess
    version: ModelVersion = field(compare=False)


@functools.lru_cache(maxsize=2)
def _loaded(key: _ModelKey) -> Model:
    return load_model(key.version, key_store(key.access))


def score_part(scoring: Scoring, part: Part) -> PartResult:
    """Score a part, write its files, and record that it is done.

    Raises:
        RefusedError: The rows cannot be read or scored, or too many are bad. No result is recorded.
    """
    version = scoring.version
    model = _loaded(_ModelKey(version.uri, version.manifest_hash, scoring.access, version))
    files: list[FileOfRows] = []
    set_aside_files: list[FileOfRows] = []
    counts: Counter[str] = Counter()
    rows, columns = 0, ()
    for chunk in read_part(
        scoring.source, part, scoring.read_columns, part_rows=scoring.part_rows, access=scoring.access
    ):
        reasons = Reasons(chunk.table.num_rows, scoring.max_bad - counts.total())
        table, usable = model_rows(chunk.table, scoring.inputs, reasons, in_task=scoring.in_tasks)
        scored, predictions = predict(model, usable, reasons)
        output = output_table(scoring, table, chunk, scored, predictions)
        rows, columns = rows + chunk.table.num_rows, tuple(output.column_names)
        counts += reasons.counts
        name = scores_name(part.number, chunk.number)
        scoring.folder.write(output, name)
        files.append(FileOfRows(name=name, rows=output.num_rows))
        if scored.positions.size < chunk.table.num_rows:
            bad = set_aside_table(chunk, reasons)
            name = set_aside_name(part.number, chunk.number)
            scoring.folder.write(bad, name)
            set_aside_files.append(FileOfRows(name=name, rows=bad.num_rows))
    result = PartResult(
        number=part.number,
        rows=rows,
        files=tuple(files),
        set_aside_files=tuple(set_aside_files),
        set_aside=dict(counts),
        columns=columns,
    )
    write_result(scoring.folder, result)
    return result


def output_table(
    scoring: Scoring, table: pa.Table, chunk: Chunk, scored: ModelRows, predictions: Predictions
) -> pa.Table:
    """Return the output's rows.

    Args:
        scoring: The run.
        table: The chunk's columns in their types.
        chunk: The chunk.
        scored: The rows with a score.
        predictions: Their predictions.
    """
    count = scored.positions.size
    numbers = chunk.first_row + scored.positions
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        PREDICTION_ID: prediction_ids(scoring.run, numbers),
        ROW: pa.array(numbers, pa.int64()),
        "model": pa.repeat(pa.scalar(scoring.version.name), count),
        "version": pa.repeat(pa.scalar(scoring.version.version, pa.int64()), count),
        "time": pa.repeat(pa.scalar(scoring.time, TIME), count),
        "as_of": _as_of(scoring, scored.table),
    }
    columns |= answer_columns(predictions)
    result = pa.table(columns)
    kept = take(table.select(list(scoring.kept_columns)), scored.positions)
    more = dict(zip(kept.column_names, kept.columns, strict=True))
    more |= {name: scored.table[name] for name in scoring.input_columns}
    return append_columns(result, more)


def _as_of(scoring: Scoring, rows: pa.Table) -> pa.Array | pa.ChunkedArray:
    """Return the time of each row: that of its features, else the run's start."""
    if EVENT in rows.column_names and pa.types.is_timestamp(rows[EVENT].type):
        column = rows[EVENT]
        times = column.cast(pa.timestamp("us", column.type.tz or "UTC"), safe=False).cast(TIME)
        return pc.coalesce(times, pa.scalar(scoring.time, TIME))
    return pa.repeat(pa.scalar(scoring.time, TIME), rows.num_rows)


def set_aside_table(chunk: Chunk, reasons: Reasons) -> pa.Table:
    """Return the rows without a score: position in the input, reason, and the row as it was read."""
    positions = np.flatnonzero(~reasons.good)
    rows = chunk.table.take(pa.array(positions))
    own = {
        ROW: pa.array(chunk.first_row + positions, pa.int64()),
        REASON: reasons.text.take(pa.array(positions)),
    }
    others = [name for name in rows.column_names if name not in own]
    return append_columns(pa.table(own), {name: rows[name] for name in others})


_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), dtype="S2")


def prediction_ids(run: str, numbers: np.ndarray) -> pa.Array:
    """Return the ids of rows: the run's 16 digits, then the row's position as 16 digits. All are hexadecimal."""
    big_endian = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
    text = np.empty((len(numbers), 32), dtype=np.uint8)
    text[:, :16] = np.frombuffer(run.encode(), dtype=np.uint8)
    text[:, 16:] = _HEX[big_endian].view(np.uint8).reshape(-1, 16)
    offsets = np.arange(0, 32 * len(numbers) + 1, 32, dtype=np.int64)
    return pa.Array.from_buffers(
        pa.large_string(),
        len(numbers),
        [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text))],
    ).cast(pa.string())


def columns_to_read(plan: InputPlan, kept: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the input that a run needs, in the input's order."""
    wanted = {*kept, EVENT}
    if plan.read is None:
        wanted |= set(plan.signature.columns)
    else:
        wanted |= {key for view in plan.read.spec.views for key in view.join_keys}
        wanted |= {one.name for transform in plan.read.spec.on_demand for one in transform.inputs}
    return tuple(name for name in present if name in wanted)
