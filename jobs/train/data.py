"""Read a training set and prepare it for fitting: encoded matrix, target, and the split of the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, TrainingSetError, did_you_mean
from cluster.ledger import Ledger
from cluster.runtime import InputSpec, ModelSignature, encode
from cluster.runtime.encoding import Matrix
from cluster.runtime.signature import Label
from cluster.security.encryption.parquet import ProtectedFileCorrupt, ProtectedFiles
from cluster.storage import Layout, exists, read_bytes, resolve, sha256
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.offline.row_hash import has_row_hash
from feature_jobs.store.offline.stored_training_set import read_stored_training_set, training_set_aad
from feature_jobs.store.types.dtypes import list_of
from jobs.train.arrow_types import is_text, value_type, without_string_views
from jobs.train.config import LearningConfig
from jobs.train.split import Mask, describe_split, held_out_mask, resolve_split
from jobs.train.target import Target, encode_target, learn_classes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """A training set as read from disk."""

    table: pa.Table
    manifest: dict[str, Any]
    """Content of the manifest; empty if the file has no manifest."""
    hash: str
    """Row hash from the manifest; without a manifest, the SHA-256 of the file."""
    join_keys: tuple[str, ...] = ()
    """Join keys of the entity rows, in the order of the service's views; empty without a manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Encoded data that a model family is fitted to."""

    signature: ModelSignature
    matrix: Matrix
    """float32 [rows, inputs]; missing values are NaN."""
    target: Target
    """For each row, the index of its class (int64), or its value in a regression (float64)."""
    fit: Mask
    """Rows to fit the model on."""
    validation: Mask
    """Rows for early stopping."""
    held_out: Mask
    """Rows that fitting never uses; the model is evaluated on them."""


def read_training_set(path: str, files: ProtectedFiles, *, places: Layout, ledger: Ledger) -> TrainingSet:
    """Read a training set and its manifest.

    A file below the storage root must be a training set that this installation built, unchanged. A file elsewhere
    belongs to the caller. It is compared with its manifest if there is one in the same folder.

    Args:
        path: Parquet file.
        files: Reads encrypted files with the caller's keys.
        places: Folders below the storage root.
        ledger: Has the events of all training sets that were built.

    Raises:
        TrainingSetError: The file is missing, unreadable, empty, or differs from what was built.
    """
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(
            f"No training set at {uri}. Build one with `python -m feature_jobs.training_set`."
        )
    manifest_uri = f"{uri.removesuffix('.parquet')}.manifest.json"
    try:
        if training_set_aad(uri, places) is not None:
            table = read_stored_training_set(uri, manifest_uri, places=places, ledger=ledger, files=files)
        else:
            table = files.read(uri)
    except ProtectedFileCorrupt as error:
        raise TrainingSetError(f"{uri} cannot be read: {error}") from error
    if table.num_rows == 0:
        raise TrainingSetError(f"Training set {uri} has no rows.")
    table = without_string_views(table)
    manifest = read_manifest(manifest_uri, table) if exists(manifest_uri) else {}
    return TrainingSet(
        table=table,
        manifest=manifest,
        hash=manifest.get("row_hash") or sha256(uri),
        join_keys=join_keys(manifest, ledger),
    )


def read_manifest(uri: str, table: pa.Table) -> dict[str, Any]:
    """Read the manifest of a training set and compare it with the table.

    Raises:
        TrainingSetError: The manifest cannot be read, or describes another file.
    """
    try:
        manifest: dict[str, Any] = json.loads(read_bytes(uri))
        columns = [str(column["name"]) for column in manifest["columns"]]
        rows = int(manifest["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingSetError(
            f"{uri} is not the manifest of a training set ({error!r}). Build the training set again."
        ) from error
    existing = set(table.column_names)
    missing = [name for name in columns if name not in existing]
    if rows != table.num_rows or missing:
        missing_text = f", and no column '{missing[0]}'" if missing else ""
        raise TrainingSetError(
            f"{uri} describes {rows} rows, but the file has {table.num_rows}{missing_text}. "
            "Build the training set again."
        )
    if "row_hash" in manifest and not has_row_hash(table, manifest["row_hash"]):
        raise TrainingSetError(
            f"{uri} does not describe the rows of the file. Build the training set again, or delete the manifest to "
            "train on the file as it is."
        )
    return manifest


def join_keys(manifest: dict[str, Any], ledger: Ledger) -> tuple[str, ...]:
    """Return the join keys of a manifest's entity rows.

    A manifest of an older release names only the service. The keys are then read from the ledger; if the ledger does
    not have the service, the result is empty.
    """
    if "join_keys" in manifest:
        return tuple(manifest["join_keys"])
    try:
        spec = service_spec(ledger, manifest["service"], manifest["service_version"])
    except (KeyError, DefinitionError):
        return ()
    return tuple(dict.fromkeys(key for view in spec.views for key in view.join_keys))


def prepare(config: LearningConfig, source: TrainingSet, *, threshold: float = 0.5) -> Dataset:
    """Split the rows, learn the signature from the rows to fit on, and encode all rows.

    Raises:
        TrainingSetError: A column is missing, or a part of the split has no rows.
    """
    split = resolve_split(config.split, source)
    held_out = held_out_mask(split, source.table, seed=config.seed)
    rest = np.flatnonzero(~held_out)
    order = np.random.default_rng(config.seed).permutation(rest)
    num_validation = max(1, int(len(rest) * config.validation_share))
    validation, fit = np.zeros(len(held_out), np.bool_), np.zeros(len(held_out), np.bool_)
    validation[order[:num_validation]] = True
    fit[order[num_validation:]] = True
    for name, mask in (("held-out", held_out), ("training", fit)):
        if not mask.any():
            raise TrainingSetError(
                f"The split ({describe_split(split, source.table)}) leaves no {name} rows of {len(held_out)}. Set "
                "another `split.column` or `split.modulo`; `split.column=null` draws rows by the seed."
            )
    signature = learn_signature(config, source, fit=fit, threshold=threshold)
    labels = label_column(source.table, config.label)
    return Dataset(
        signature=signature,
        matrix=encode(signature, source.table),
        target=encode_target(signature.task, labels, classes=signature.classes, label=config.label),
        fit=fit,
        validation=validation,
        held_out=held_out,
    )


def learn_signature(
    config: LearningConfig, source: TrainingSet, *, fit: Mask, threshold: float
) -> ModelSignature:
    """Learn inputs and categories from the rows to fit on, and classes from all rows.

    Raises:
        TrainingSetError: An input is missing, or has a type that models cannot take.
    """
    table, manifest = source.table, source.manifest
    rows = table.filter(pa.array(fit))
    declared = {column["name"]: column for column in manifest.get("columns", [])}
    try:
        inputs = tuple(
            _input(rows[name], name, config, declared.get(name, {})) for name in input_names(config, source)
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


def label_column(table: pa.Table, label: str) -> pa.ChunkedArray:
    """Return the label column.

    Raises:
        TrainingSetError: The table has no such column.
    """
    if label not in table.column_names:
        raise TrainingSetError(
            f"The training set has no label '{label}'.{did_you_mean(label, table.column_names)}"
        )
    return table[label]


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
    """Return the input of a list column with fixed length; each position becomes one column of the matrix.

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
