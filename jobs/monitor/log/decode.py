"""Convert logged records to typed rows, one row for each answered entity.

A file of the log's table has inputs and answers as JSON text. Arrow parses the text of a whole file with the types of
the signature, which is about ten times as fast as one record at a time. Arrow refuses a file with any value of another
type. Such a file is then converted record by record, which counts these values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from cluster.records.columns import OTHER, to_record
from cluster.records.reading import RESERVED_COLUMNS, build_log, exact_column
from cluster.records.signature_types import TypedRows, to_typed_rows
from cluster.runtime import ModelSignature, Task
from cluster.runtime.values import MAX_INTEGER, value_type

NO_FAULT = '{"fault":""'
"""How the column `other` begins for a record without a fault whose other fields fit their columns. The fields of a
record are in the order of `PredictionRecord`, so those that do not fit come before the fault."""
COLUMNS = ("prediction_id", "time", "as_of", "version", "variant", "arm", "features", "predictions", OTHER)
"""Columns of the log's table that conversion needs."""
KEY_COLUMNS = ("prediction_id", "row", "as_of")
_BLOCK_BYTES = 8 * 2**20
_ARROW: dict[type, pa.DataType] = {
    bool: pa.bool_(),
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
}


class Answers(NamedTuple):
    """Answered rows of one version."""

    rows: pl.DataFrame
    """Columns: `KEY_COLUMNS`, inputs and answers. Values are in the types of the signature."""
    odd_inputs: dict[str, int]
    """For each input, the number of logged values that do not have the input's type. Such values are null."""


def decode(records: pa.Table, signature: ModelSignature) -> Answers:
    """Return the answered rows of records that one version wrote. `records` has the columns `COLUMNS`."""
    if records.num_rows and (rows := _decode_at_once(records, signature)) is not None:
        return Answers(rows, {})
    return _decode_each(records, signature)


def _decode_each(records: pa.Table, signature: ModelSignature) -> Answers:
    # Rows without an answer are not needed, so the entities are not either.
    log = build_log({"entities": []} | to_record("predictions", row) for row in records.to_pylist())
    typed = to_typed_rows(log.answers, signature)
    return Answers(_monitored_columns(typed), typed.num_invalid)


def _decode_at_once(records: pa.Table, signature: ModelSignature) -> pl.DataFrame | None:
    """Return the rows, or None if a record has a fault, a null score, or a value of another type."""
    if not pc.all(pc.fill_null(pc.starts_with(records[OTHER], NO_FAULT), True)).as_py():
        return None
    schema = _schema(signature)
    if schema is None:
        return None
    lines = pc.binary_join_element_wise(
        '{"f":', records["features"], ',"p":', records["predictions"], "}\n", ""
    )
    if lines.null_count:
        return None
    try:
        parsed = pj.read_json(
            pa.BufferReader(_text_buffer(_array(lines))),
            read_options=pj.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
            parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        ).combine_chunks()
    except pa.ArrowException:
        return None
    if parsed.num_rows != records.num_rows:
        return None
    answers = _flat(parsed["p"])
    lengths = pc.list_value_length(_array(parsed["p"]))
    positions = _positions(lengths)
    columns: dict[str, pa.Array] = {
        "prediction_id": records["prediction_id"].take(positions.record),
        "row": positions.row,
        "as_of": records["as_of"].take(positions.record),
    }
    for name in schema.field("p").type.value_type:
        columns[name.name] = answers.field(name.name)
    features = _array(parsed["f"])
    for spec in features.type:
        values = features.field(spec.name)
        if not pc.list_value_length(values).equals(lengths):
            return None
        columns[spec.name] = _flat(values)
    rows = pl.DataFrame({name: pl.from_arrow(values) for name, values in columns.items()})
    return rows if _is_valid(rows, signature) else None


class _Positions(NamedTuple):
    record: pa.Array
    """For each row, the number of its record."""
    row: pa.Array
    """For each row, its number within the record."""


def _positions(lengths: pa.Array) -> _Positions:
    import numpy as np

    counts = lengths.to_numpy(zero_copy_only=False)
    ends = np.cumsum(counts)
    record = np.repeat(np.arange(len(counts)), counts)
    row = np.arange(len(record)) - np.repeat(ends - counts, counts)
    return _Positions(pa.array(record), pa.array(row.astype(np.int64)))


def _schema(signature: ModelSignature) -> pa.Schema | None:
    """Return the schema of a line; None if an input or the label has no type of Arrow's JSON reader."""
    inputs = []
    for spec in signature.inputs:
        if spec.length is not None or spec.name in RESERVED_COLUMNS:
            continue
        if (target := value_type(spec.dtype)) is None:
            return None
        inputs.append(pa.field(spec.name, pa.list_(_ARROW[target.base])))
    if signature.task is Task.regression:
        answer = [pa.field("value", pa.float64())]
    else:
        label_types = {type(name) for name in signature.classes or ()}
        if len(label_types) != 1 or not label_types <= _ARROW.keys():
            return None
        answer = [pa.field("label", _ARROW[label_types.pop()])]
        if signature.task is Task.binary:
            answer.append(pa.field("probability", pa.float64()))
        else:
            classes = [pa.field(str(name), pa.float64()) for name in signature.classes or ()]
            answer.append(pa.field("probabilities", pa.struct(classes)))
    return pa.schema([pa.field("f", pa.struct(inputs)), pa.field("p", pa.list_(pa.struct(answer)))])


def _is_valid(rows: pl.DataFrame, signature: ModelSignature) -> bool:
    """Return whether each row has a score and a known label, and each number is in the range of its type."""
    scores = {Task.regression: "value", Task.binary: "probability", Task.multiclass: "probabilities"}
    score = rows[scores[signature.task]]
    parts = score.struct.unnest().get_columns() if signature.task is Task.multiclass else [score]
    if any(part.null_count() for part in parts):
        return False
    if signature.task is not Task.regression and not rows["label"].is_in(list(signature.classes or ())).all():
        return False
    for spec in signature.inputs:
        target = value_type(spec.dtype)
        if spec.name not in rows.columns or target is None or target.base in (bool, str):
            continue
        low, high = rows[spec.name].min(), rows[spec.name].max()
        if low is None or high is None:
            continue
        least, greatest = (
            (target.least, target.greatest) if target.base is int else (-MAX_INTEGER, MAX_INTEGER)
        )
        if not (least <= low and high <= greatest):  # type: ignore[operator]
            return False
    return True


def _text_buffer(texts: pa.Array) -> pa.Buffer:
    """Return the concatenated texts of an array without a copy."""
    offsets = pa.Array.from_buffers(
        pa.int32(), len(texts) + 1, [None, texts.buffers()[1]], offset=texts.offset
    )
    start, end = offsets[0].as_py(), offsets[-1].as_py()
    return texts.buffers()[2].slice(start, end - start)


def _array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return _array(column).flatten()


def _monitored_columns(answers: TypedRows) -> pl.DataFrame:
    """Select the columns to monitor. Columns of Python objects are dropped, because such a frame cannot be stored.

    The label is never dropped. If its values have several types, they are converted to text.
    """
    rows = answers.rows
    if "label" in rows.columns:
        rows = rows.with_columns(text_if_mixed(exact_column("label", rows["label"].to_list())))
    return rows.select(name for name in (*KEY_COLUMNS, *answers.names) if rows[name].dtype != pl.Object)


def text_if_mixed(column: pl.Series) -> pl.Series:
    """Return a column of Python objects as text, and any other column unchanged."""
    if column.dtype != pl.Object:
        return column
    values: Sequence[Any] = column.to_list()
    return pl.Series(column.name, [None if value is None else str(value) for value in values])
