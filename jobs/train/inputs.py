"""Choice of a model's inputs from the columns of a training set, and what is learned about each from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import TrainingSetError, did_you_mean
from cluster.runtime import InputSpec, ModelSignature
from cluster.runtime.signature import Label
from feature_jobs.store.types.dtypes import list_of
from jobs.train.config import LearningConfig
from jobs.train.rows.arrow_types import is_text, value_type
from jobs.train.rows.target import label_column, learn_classes
from jobs.train.split import Mask, resolve_split

if TYPE_CHECKING:
    from jobs.train.data import TrainingSet


def learn_signature(
    config: LearningConfig, source: TrainingSet, *, fit: Mask, threshold: float
) -> ModelSignature:
    """Return the model's signature: inputs and categories from the rows to fit on, and classes from all rows.

    Raises:
        TrainingSetError: An input is missing, or has a type that models cannot take.
    """
    table, manifest = source.table, source.manifest
    rows_to_fit = pa.array(fit)
    declared = {column["name"]: column for column in manifest.get("columns", [])}
    try:
        inputs = tuple(
            _input(table[name].filter(rows_to_fit), name, config, declared.get(name, {}))
            for name in input_names(config, source)
        )
        return ModelSignature(
            task=config.task,
            inputs=inputs,
            label=config.label,
            classes=learn_classes(config.task, label_column(table, config.label), label=config.label),
            service=manifest.get("service", ""),
            service_version=manifest.get("service_version", ""),
            threshold=threshold,
        )
    except ValueError as error:
        raise TrainingSetError(str(error)) from error


def input_names(config: LearningConfig, source: TrainingSet) -> list[str]:
    """Return the names of the input columns.

    Raises:
        TrainingSetError: A configured column is missing, a column is duplicated, or the label is an input.
    """
    column_names = source.table.column_names
    known = set(column_names)
    if (duplicate := _first_duplicate(column_names)) is not None:
        raise TrainingSetError(f"The training set has two columns '{duplicate}'. Remove one of them.")
    for name in [*(config.inputs or []), *config.exclude]:
        if name not in known:
            raise TrainingSetError(f"The training set has no column '{name}'.{did_you_mean(name, known)}")
    names = config.inputs if config.inputs is not None else _default_inputs(config, source)
    if (duplicate := _first_duplicate(names)) is not None:
        raise TrainingSetError(f"Input '{duplicate}' is named twice. Name it once in `inputs`.")
    if config.label in names:
        raise TrainingSetError(f"The label '{config.label}' is among the inputs. Remove it from `inputs`.")
    excluded = set(config.exclude)
    return [name for name in names if name not in excluded]


def _default_inputs(config: LearningConfig, source: TrainingSet) -> list[str]:
    """Return the features of the manifest, or without a manifest all columns except label, keys and times."""
    if source.manifest:
        return [column["name"] for column in source.manifest["columns"]]
    not_inputs = {config.label, resolve_split(config.split, source).column, "event_timestamp"}
    return [
        field.name
        for field in source.table.schema
        if field.name not in not_inputs
        and not field.name.endswith("_id")
        and not pa.types.is_temporal(field.type)
    ]


def _first_duplicate(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _input(column: pa.ChunkedArray, name: str, config: LearningConfig, declared: dict[str, Any]) -> InputSpec:
    dtype = value_type(column)
    if pa.types.is_nested(dtype):
        return _list_input(dtype, name, str(declared.get("dtype", "")))
    if not (is_text(dtype) or declared.get("categorical")):
        return InputSpec(name=name, dtype=str(dtype))
    categories: tuple[Label, ...] = tuple(sorted(pc.unique(column.cast(dtype).drop_null()).to_pylist()))
    if len(categories) > config.max_categories:
        raise TrainingSetError(
            f"Input '{name}' has {len(categories)} categories, more than {config.max_categories}. Exclude it, or raise "
            "max_categories."
        )
    return InputSpec(name=name, dtype="string" if is_text(dtype) else str(dtype), categories=categories)


def _list_input(dtype: pa.DataType, name: str, declared_dtype: str) -> InputSpec:
    """Return the input for a column of lists of one fixed length. Each list position becomes one matrix column.

    Raises:
        TrainingSetError: The length of the lists is not fixed.
    """
    declared = list_of(declared_dtype)
    length = dtype.list_size if pa.types.is_fixed_size_list(dtype) else declared.length if declared else None
    if length is None:
        raise TrainingSetError(
            f"Input '{name}' is {declared_dtype or dtype}: lists of variable length, which no model takes. Declare "
            "the length, for example list<float32, 384>, exclude the input, or turn it into numbers in a transform."
        )
    return InputSpec(name=name, dtype=str(dtype.value_type), length=length)
