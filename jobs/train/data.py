"""From a training set on disk to an encoded matrix, a target, and the rows that are held out."""

from __future__ import annotations

import json
from collections import Counter
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
from feature_jobs.store.offline.stored_training_set import place_of, read_kept
from feature_jobs.store.types.dtypes import list_of
from jobs.train.config import LearningConfig
from jobs.train.split import Mask, describe_split, held_out_mask, resolve_split
from jobs.train.target import Target, encode_target, learn_classes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """A training set as it lies on disk."""

    table: pa.Table
    manifest: dict[str, Any]
    """Empty when none lies beside the file."""
    hash: str
    """The manifest's row hash, else the file's SHA-256."""
    join_keys: tuple[str, ...] = ()
    """Of the entity rows, in the order of the service's views; empty without a manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """What a model family learns from."""

    signature: ModelSignature
    matrix: Matrix
    """float32 [rows, inputs], NaN where missing."""
    target: Target
    fit: Mask
    """Rows to fit on."""
    validation: Mask
    """Rows for early stopping."""
    held_out: Mask
    """Rows that fitting never sees."""


def read_training_set(path: str, files: ProtectedFiles, *, places: Layout, ledger: Ledger) -> TrainingSet:
    """A training set and its manifest.

    Args:
        path: the Parquet file. Below the storage root it has to be one that was built here, as it was built;
            elsewhere it is the caller's own, and held against its manifest where one lies beside it.
        files: has the keys of the caller.
        places: the storage root's.
        ledger: knows what was built.

    Raises:
        TrainingSetError: the file is missing, no Parquet, empty, or not what was built.
    """
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(
            f"No training set at {uri}. Build one with `python -m feature_jobs.training_set`."
        )
    beside = f"{uri.removesuffix('.parquet')}.manifest.json"
    try:
        if place_of(uri, places) is not None:
            table = read_kept(uri, beside, places=places, ledger=ledger, files=files)
        else:
            table = files.read(uri)
    except ProtectedFileCorrupt as error:
        raise TrainingSetError(f"{uri} cannot be read: {error}") from error
    if table.num_rows == 0:
        raise TrainingSetError(f"Training set {uri} has no rows.")
    manifest = read_manifest(beside, table) if exists(beside) else {}
    return TrainingSet(
        table=table,
        manifest=manifest,
        hash=manifest.get("row_hash") or sha256(uri),
        join_keys=join_keys(manifest, ledger),
    )


def read_manifest(uri: str, table: pa.Table) -> dict[str, Any]:
    """The manifest beside a training set.

    Raises:
        TrainingSetError: it cannot be read, or describes another file.
    """
    try:
        manifest: dict[str, Any] = json.loads(read_bytes(uri))
        columns = [str(column["name"]) for column in manifest["columns"]]
        rows = int(manifest["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingSetError(
            f"{uri} is no training set's manifest ({error!r}). Build the set again."
        ) from error
    there = set(table.column_names)
    missing = [name for name in columns if name not in there]
    if rows != table.num_rows or missing:
        lacks = f", and no column '{missing[0]}'" if missing else ""
        raise TrainingSetError(
            f"{uri} describes {rows} rows, the file has {table.num_rows}{lacks}. Build the training set again."
        )
    if "row_hash" in manifest and not has_row_hash(table, manifest["row_hash"]):
        raise TrainingSetError(
            f"{uri} describes other rows than the file has. Build the training set again, or take the manifest away "
            "to learn from the file as it is."
        )
    return manifest


def join_keys(manifest: dict[str, Any], ledger: Ledger) -> tuple[str, ...]:
    """The join keys of a manifest's entity rows; a manifest of an older release names only the service."""
    if "join_keys" in manifest:
        return tuple(manifest["join_keys"])
    try:
        spec = service_spec(ledger, manifest["service"], manifest["service_version"])
    except (KeyError, DefinitionError):
        return ()
    return tuple(dict.fromkeys(key for view in spec.views for key in view.join_keys))


def prepare(config: LearningConfig, source: TrainingSet, *, threshold: float = 0.5) -> Dataset:
    """Split, learn the signature from the rows to fit on, and encode.

    Raises:
        TrainingSetError: a column is missing, or a part of the split has no rows.
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
    """Inputs, categories and classes, from the rows to fit on alone.

    Raises:
        TrainingSetError: an input is missing or cannot be one.
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
    """The columns to learn from.

    Raises:
        TrainingSetError: a configured column is missing.
    """
    table = source.table
    doubled = [name for name, count in Counter(table.column_names).items() if count > 1]
    if doubled:
        raise TrainingSetError(f"The training set has two columns '{doubled[0]}'; leave only one of them.")
    there = dict.fromkeys(table.column_names)
    for name in [*(config.inputs or []), *config.exclude]:
        if name not in there:
            raise TrainingSetError(f"The training set has no column '{name}'.{did_you_mean(name, there)}")
    names = config.inputs
    if names is None and source.manifest:
        names = [column["name"] for column in source.manifest["columns"]]
    if names is None:
        apart = {config.label, resolve_split(config.split, source).column, "event_timestamp"}
        names = [
            field.name
            for field in table.schema
            if field.name not in apart
            and not field.name.endswith("_id")
            and not pa.types.is_temporal(field.type)
        ]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise TrainingSetError(f"Input '{doubled[0]}' is named twice; name it once in `inputs`.")
    if config.label in names:
        raise TrainingSetError(f"The label '{config.label}' is among the inputs; take it out of `inputs`.")
    excluded = set(config.exclude)
    return [name for name in names if name not in excluded]


def label_column(table: pa.Table, label: str) -> pa.ChunkedArray:
    """The label.

    Raises:
        TrainingSetError: there is no such column.
    """
    if label not in table.column_names:
        raise TrainingSetError(
            f"The training set has no label '{label}'.{did_you_mean(label, table.column_names)}"
        )
    return table[label]


def _input(column: pa.ChunkedArray, name: str, config: LearningConfig, declared: dict[str, Any]) -> InputSpec:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        return _list_input(kind, name, str(declared.get("dtype", "")))
    textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (textual or declared.get("categorical")):
        return InputSpec(name=name, dtype=str(kind))
    categories: tuple[Label, ...] = tuple(sorted(pc.unique(column.cast(kind).drop_null()).to_pylist()))
    if len(categories) > config.max_categories:
        raise TrainingSetError(
            f"Input '{name}' has {len(categories)} categories, more than {config.max_categories}: exclude it, or raise "
            "max_categories."
        )
    return InputSpec(name=name, dtype="string" if textual else str(kind), categories=categories)


def _list_input(kind: pa.DataType, name: str, dtype: str) -> InputSpec:
    """A list of numbers that always has the same length: a column of the matrix for each of them."""
    declared = list_of(dtype)
    length = kind.list_size if pa.types.is_fixed_size_list(kind) else declared.length if declared else None
    if length is None:
        raise TrainingSetError(
            f"Input '{name}' is {dtype or kind}, lists of any length, which no model takes: declare their length, as "
            "list<float32, 384>, exclude the input, or make numbers of it in a transform."
        )
    return InputSpec(name=name, dtype=str(kind.value_type), length=length)
