"""The split of a training set into rows to train on and held-out rows.

Training, evaluation and monitoring hold out the same rows. Training records the split with the version. Evaluation and
monitoring read the split of the version.
"""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cluster.errors import TrainingSetError, did_you_mean
from cluster.registry import ModelVersion
from jobs.train.config import AUTO, SplitConfig, parse_time
from jobs.train.rows.arrow_types import is_text, value_type

if TYPE_CHECKING:
    from jobs.train.data import TrainingSet
    from jobs.train.rows.file import RowFile

Mask = npt.NDArray[np.bool_]
EVENT = "event_timestamp"
"""Column with the time of each row."""


def resolve_split(split: SplitConfig, source: TrainingSet) -> SplitConfig:
    """Return the split with `auto` replaced by the actual column.

    The column is the first join key that splits the rows into two non-empty parts.
    """
    if split.from_time is not None:
        return replace(split, column=None)
    if split.column != AUTO or AUTO in source.table.column_names:
        return split
    columns = [name for name in _entity_columns(source) if _can_split(source.table[name])]
    choices = [replace(split, column=name) for name in columns]
    for choice in choices:
        held_out = held_out_mask(choice, source.table, seed=0)
        if held_out.any() and not held_out.all():
            return choice
    return choices[0] if choices else replace(split, column=None)


def held_out_mask(split: SplitConfig, table: pa.Table | RowFile, *, seed: int) -> Mask:
    """Return the mask of the held-out rows.

    Args:
        split: Split whose column is not `auto`.
        table: Rows of the training set.
        seed: Seed that draws the rows if the split has no column.

    Raises:
        TrainingSetError: The split's column is missing, has nulls, or has a type that cannot be split by.
    """
    if split.from_time is not None:
        start = parse_time(split.from_time, name="split.from_time")
        return np.asarray(event_times(table) >= microseconds(start))
    if split.column is None:
        draw = np.random.default_rng(seed).integers(split.modulo, size=table.num_rows)
        return np.asarray(draw == split.remainder)
    if split.column not in table.column_names:
        raise TrainingSetError(
            f"The training set has no column '{split.column}' to split by."
            f"{did_you_mean(split.column, table.column_names)} Set `split.column=null` to draw rows by the seed."
        )
    column = table[split.column]
    if not _can_split(column):
        raise TrainingSetError(
            f"Column '{split.column}' cannot be split by: it is {column.type} with {column.null_count} nulls, but must "
            "be whole numbers or text without nulls. Set `split.column=null` to draw rows by the seed."
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(value_type(column))
    numbers: npt.NDArray[Any]
    if not pa.types.is_integer(column.type):
        numbers = _hashes(column, seed=split.seed or 0)
    else:
        numbers = column.to_numpy() if split.seed is None else mix(column.to_numpy(), seed=split.seed)
    return np.asarray(numbers % split.modulo == split.remainder)


def validation_mask(held_out: Mask, *, share: float, seed: int) -> Mask:
    """Return the mask of the rows for early stopping: a share of the rows that are not held out, drawn by the seed."""
    rest = np.flatnonzero(~held_out)
    order = np.random.default_rng(seed).permutation(rest)
    validation = np.zeros(len(held_out), np.bool_)
    validation[order[: max(1, int(len(rest) * share))]] = True
    return validation


def version_held_out_mask(
    version: ModelVersion, source: TrainingSet, *, override: SplitConfig | None = None, advice: str
) -> Mask:
    """Return the mask of the rows that a version was not fitted on.

    Args:
        version: Model version with the split that training recorded.
        source: The training set, or another data set with the split's column.
        override: Split to use instead of the recorded one.
        advice: Sentence for the error message. It says what to do if the recorded split does not apply to `source`.

    Raises:
        TrainingSetError: The version's rows were drawn by the seed from another data set, or a column is missing.
    """
    split = override if override is not None else recorded_split(version, source)
    if (
        override is None
        and split.column is None
        and split.from_time is None
        and version.lineage.training_set_hash not in ("", source.hash)
    ):
        raise TrainingSetError(
            f"Version {version.version} of '{version.name}' held out rows drawn by the seed from its training set, "
            f"and this is another data set. {advice}"
        )
    return held_out_mask(split, source.table, seed=version.lineage.seed)


def recorded_split(version: ModelVersion, source: TrainingSet) -> SplitConfig:
    """Return the split that a version was trained with. If no split was recorded, return the default for `source`."""
    recorded = version.lineage.config.get("split") or {}
    settings = {field.name: recorded[field.name] for field in fields(SplitConfig) if field.name in recorded}
    return resolve_split(SplitConfig(**settings), source)


def describe_split(split: SplitConfig, table: pa.Table | RowFile) -> str:
    """Describe the rule of the split."""
    if split.from_time is not None:
        return f"event_timestamp from {split.from_time} on"
    if split.column is None:
        return f"drawn by the seed, one in {split.modulo}; `split.column=…` keeps all rows of an entity on one side"
    is_number = pa.types.is_integer(table.schema.field(split.column).type) and split.seed is None
    value = split.column if is_number else f"hash of {split.column}"
    return f"{value} % {split.modulo} == {split.remainder}"


def _entity_columns(source: TrainingSet) -> list[str]:
    """Return the join keys of the table. Without a manifest, return the only `*_id` column."""
    names = [key for key in source.join_keys if key in source.table.column_names]
    if names or source.manifest:
        return names
    ids = [name for name in source.table.column_names if name.endswith("_id")]
    return ids if len(ids) == 1 else []


def _can_split(column: pa.ChunkedArray) -> bool:
    dtype = value_type(column)
    return not column.null_count and (pa.types.is_integer(dtype) or is_text(dtype))


def event_times(table: pa.Table | RowFile) -> npt.NDArray[np.int64]:
    """Return the event times of all rows in microseconds since 1970.

    Raises:
        TrainingSetError: The table has no such column, or not in every row.
    """
    if EVENT not in table.column_names:
        raise TrainingSetError(f"The training set has no column '{EVENT}', so its rows have no times.")
    column = table[EVENT]
    if not pa.types.is_timestamp(column.type) or column.null_count:
        raise TrainingSetError(
            f"Column '{EVENT}' must be a time in every row; it is {column.type} with {column.null_count} nulls."
        )
    return np.asarray(column.cast(pa.timestamp("us", column.type.tz)).cast(pa.int64()).to_numpy())


def microseconds(time: datetime) -> int:
    """Return a time in microseconds since 1970."""
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def mix(values: npt.NDArray[Any], *, seed: int) -> npt.NDArray[np.uint64]:
    """Return a hash of each whole number (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        state = values.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def _hashes(column: pa.ChunkedArray, *, seed: int) -> npt.NDArray[np.int64]:
    """Return the xxh32 hash of each value. It is the same on every machine."""
    values = pc.unique(column)
    hash_of_value = np.array(
        [xxhash.xxh32_intdigest(str(value).encode(), seed=seed) for value in values.to_pylist()],
        dtype=np.int64,
    )
    return np.asarray(hash_of_value[pc.index_in(column, value_set=values).to_numpy()])
