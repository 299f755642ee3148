"""Read a training set and prepare it for fitting: encoded matrix, target, and the split of the rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import DefinitionError, TrainingSetError
from cluster.ledger import Ledger
from cluster.runtime import ModelSignature, encode
from cluster.runtime.encoding import Matrix
from cluster.security.encryption.parquet import ProtectedFileCorrupt, ProtectedFiles
from cluster.storage import Layout, exists, read_bytes, resolve, sha256
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.offline.row_hash import has_row_hash
from feature_jobs.store.offline.stored_training_set import read_stored_training_set, training_set_aad
from jobs.train.arrow_types import without_string_views
from jobs.train.config import LearningConfig
from jobs.train.inputs import learn_signature
from jobs.train.split import Mask, describe_split, held_out_mask, resolve_split
from jobs.train.target import Target, encode_target, label_column


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

    A file below the storage root must be an unchanged training set that this installation built. A file elsewhere
    belongs to the caller. If a manifest is in the same folder, the file must match the manifest.

    Args:
        path: Parquet file.
        files: Reads encrypted files with the caller's keys.
        places: Folders below the storage root.
        ledger: Ledger with an event for each training set that was built.

    Raises:
        TrainingSetError: The file is missing, unreadable or empty, or differs from the training set that was built.
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

    A manifest of an older release names only the service. In this case, the keys are read from the ledger. If the
    service is not in the ledger, the result is empty.
    """
    if "join_keys" in manifest:
        return tuple(manifest["join_keys"])
    try:
        spec = service_spec(ledger, manifest["service"], manifest["service_version"])
    except (KeyError, DefinitionError):
        return ()
    return tuple(dict.fromkeys(key for view in spec.views for key in view.join_keys))


def prepare(config: LearningConfig, source: TrainingSet, *, threshold: float = 0.5) -> Dataset:
    """Split the rows, learn the model's signature, and encode all rows.

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
