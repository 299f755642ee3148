"""Which rows of a training set are held out, and how a version's own split is found again.

Training, evaluation and monitoring hold out the same rows: training records its split with the version, and the others
read it from there.
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
from jobs.train.config import AUTO, SplitConfig

if TYPE_CHECKING:
    from jobs.train.data import TrainingSet

Mask = npt.NDArray[np.bool_]


def resolve_split(split: SplitConfig, source: TrainingSet) -> SplitConfig:
    """The split with the column that `auto` stands for."""
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
    """The rows that are held out.

    Args:
        split: with its column resolved.
        table: the training set.
        seed: rows are drawn by it where the split has no column.

    Raises:
        TrainingSetError: the split's column is missing, or cannot be split by.
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
            f"Column '{split.column}' must hold whole numbers or texts without nulls to split by, and is {column.type} "
            f"with {column.null_count} nulls. Set `split.column=null` to draw rows by the seed."
        )
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    numbers = column.to_numpy() if pa.types.is_integer(column.type) else _hashes(column)
    return np.asarray(numbers % split.modulo == split.remainder)


def held_out_of(
    version: ModelVersion, source: TrainingSet, *, instead: SplitConfig | None = None, otherwise: str
) -> Mask:
    """The rows of a data set that a version was not fitted on.

    Args:
        version: its split was recorded when it was trained.
        source: the training set, or another data set with the split's column.
        instead: a split to go by in place of the version's own.
        otherwise: what the caller can do where the version's own split does not apply, as a sentence.

    Raises:
        TrainingSetError: the version's rows were drawn by the seed from another data set, or a column is missing.
    """
    split = instead if instead is not None else recorded_split(version, source)
    if (
        instead is None
        and split.column is None
        and version.lineage.training_set_hash not in ("", source.hash)
    ):
        raise TrainingSetError(
            f"Version {version.version} of '{version.name}' held out rows that were drawn by the seed from its "
            f"training set, and this is another data set. {otherwise}"
        )
    return held_out_mask(split, source.table, seed=version.lineage.seed)


def recorded_split(version: ModelVersion, source: TrainingSet) -> SplitConfig:
    """The split that a version was trained with; one that recorded none gets the default for the data set."""
    recorded = version.lineage.config.get("split") or {}
    known = {each.name: recorded[each.name] for each in fields(SplitConfig) if each.name in recorded}
    return resolve_split(SplitConfig(**known), source)


def describe_split(split: SplitConfig, table: pa.Table) -> str:
    """The rule in words."""
    if split.column is None:
        return f"drawn by the seed, one of {split.modulo}; `split.column=…` keeps all rows of an entity on one side"
    is_number = pa.types.is_integer(table[split.column].type)
    value = split.column if is_number else f"hash of {split.column}"
    return f"{value} % {split.modulo} == {split.remainder}"


def _entity_columns(source: TrainingSet) -> list[str]:
    names = [key for key in source.join_keys if key in source.table.column_names]
    if names or source.manifest:
        return names
    ids = [name for name in source.table.column_names if name.endswith("_id")]
    return ids if len(ids) == 1 else []


def _can_split(column: pa.ChunkedArray) -> bool:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return not column.null_count and (pa.types.is_integer(kind) or _is_text(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _hashes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A hash of each value, the same on every machine."""
    values = pc.unique(column)
    hashed = np.array(
        [xxhash.xxh32_intdigest(str(value).encode()) for value in values.to_pylist()], dtype=np.int64
    )
    return np.asarray(hashed[pc.index_in(column, value_set=values).to_numpy()])
