"""The split of a training set into rows to train on and held-out rows.

Training, evaluation and monitoring hold out the same rows. Training records the split with the version. Evaluation and
monitoring read the split of the version.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cluster.errors import TrainingSetError, did_you_mean
from cluster.registry import ModelVersion
from jobs.train.arrow_types import is_text, value_type
from jobs.train.config import AUTO, SplitConfig

if TYPE_CHECKING:
    from jobs.train.data import TrainingSet

Mask = npt.NDArray[np.bool_]


def resolve_split(split: SplitConfig, source: TrainingSet) -> SplitConfig:
    """Return the split with `auto` replaced by the actual column.

    The column is the first join key that splits the rows into two non-empty parts.
    """
    if split.column != AUTO or AUTO in source.table.column_names:
        return split
    columns = [name for name in _entity_columns(source) if _can_split(source.table[name])]
    choices = [replace(split, column=name) for name in columns]
    for choice in choices:
        held_out = held_out_mask(choice, source.table, seed=0)
        if held_out.any() and not held_out.all():
            return choice
    return choices[0] if choices else replace(split, column=None)


def held_out_mask(split: SplitConfig, table: pa.Table, *, seed: int) -> Mask:
    """Return the mask of the held-out rows.

    Args:
        split: Split whose column is not `auto`.
        table: Rows of the training set.
        seed: Seed that draws the rows if the split has no column.

    Raises:
        TrainingSetError: The split's column is missing, has nulls, or has a type that cannot be split by.
    """
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
    numbers = column.to_numpy() if pa.types.is_integer(column.type) else _hashes(column)
    return np.asarray(numbers % split.modulo == split.remainder)


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


def describe_split(split: SplitConfig, table: pa.Table) -> str:
    """Describe the rule of the split."""
    if split.column is None:
        return f"drawn by the seed, one in {split.modulo}; `split.column=…` keeps all rows of an entity on one side"
    is_number = pa.types.is_integer(table[split.column].type)
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


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return the xxh32 hash of each value. It is the same on every machine."""
    values = pc.unique(column)
    hash_of_value = np.array(
        [xxhash.xxh32_intdigest(str(value).encode()) for value in values.to_pylist()], dtype=np.int64
    )
    return np.asarray(hash_of_value[pc.index_in(column, value_set=values).to_numpy()])
