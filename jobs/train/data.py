"""Read a training set and prepare it for fitting: encoded matrix, target, and the split of the rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import DefinitionError, TrainingSetError
from cluster.ledger import Ledger
from cluster.ledger.events import TrainingSetBuilt
from cluster.runtime import ModelSignature
from cluster.runtime.encoding import Matrix
from cluster.security.encryption.parquet import ProtectedFileCorrupt, ProtectedFiles
from cluster.security.keys.access import KeyAccess
from cluster.storage import Layout, exists, read_bytes, resolve, sha256
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.offline.row_hash import has_row_hash
from feature_jobs.store.offline.stored_training_set import (
    find_stored_training_set,
    read_stored_training_set,
    require_row_hash,
    training_set_aad,
)
from jobs.train.config import LearningConfig, parse_time
from jobs.train.inputs import learn_signature
from jobs.train.rows.arrow_types import without_string_views
from jobs.train.rows.encoded import EncodedRows, Part, Parts
from jobs.train.rows.file import RowFile, RowGroups, TableRows, open_row_file
from jobs.train.rows.target import Target
from jobs.train.split import (
    Mask,
    describe_split,
    event_times,
    held_out_mask,
    microseconds,
    resolve_split,
    validation_mask,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """A training set as read from disk."""

    table: pa.Table
    """The rows: an Arrow table, or a `RowFile` that reads a column when it is used. Both have `schema`, `num_rows`,
    `column_names` and `[name]`."""
    manifest: dict[str, Any]
    """Content of the manifest; empty if the file has no manifest."""
    hash: str
    """Row hash from the manifest; without a manifest, the SHA-256 of the file."""
    join_keys: tuple[str, ...] = ()
    """Join keys of the entity rows, in the order of the service's views; empty without a manifest."""
    built_at: str = ""
    """ISO 8601 time at which the training set was built; empty without a manifest."""

    @property
    def row_groups(self) -> RowGroups:
        """The rows, one group at a time."""
        return self.table if isinstance(self.table, RowFile) else TableRows(table=self.table)


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
    uri, manifest_uri = _find_files(path)
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
    return _training_set(uri, table, manifest, ledger)


def open_training_set(path: str, access: KeyAccess, *, places: Layout, ledger: Ledger) -> TrainingSet:
    """Check a training set, and return it without its rows: `table` reads them by columns or by row groups.

    For arguments and errors see `read_training_set`.

    Args:
        path: Parquet file.
        access: Access to the caller's keys.
        places: Folders below the storage root.
        ledger: Ledger with an event for each training set that was built.
    """
    uri, manifest_uri = _find_files(path)
    try:
        if training_set_aad(uri, places) is not None:
            stored = find_stored_training_set(uri, manifest_uri, places=places, ledger=ledger)
            table = open_row_file(uri, access, protection=stored.protection, place=stored.aad)
            require_row_hash(table, stored, uri)
            is_checked = True
        else:
            table, is_checked = open_row_file(uri, access), False
        if not table.num_rows:
            raise TrainingSetError(f"Training set {uri} has no rows.")
        manifest = read_manifest(manifest_uri, table, is_checked=is_checked) if exists(manifest_uri) else {}
    except ProtectedFileCorrupt as error:
        raise TrainingSetError(f"{uri} cannot be read: {error}") from error
    return _training_set(uri, table, manifest, ledger)


def _find_files(path: str) -> tuple[str, str]:
    """Return the URIs of a training set and of its manifest. Only the training set must exist."""
    uri = resolve(path)
    if not exists(uri):
        raise TrainingSetError(
            f"No training set at {uri}. Build one with `python -m feature_jobs.training_set`."
        )
    return uri, f"{uri.removesuffix('.parquet')}.manifest.json"


def _training_set(
    uri: str, table: pa.Table | RowFile, manifest: dict[str, Any], ledger: Ledger
) -> TrainingSet:
    return TrainingSet(
        table=table,
        manifest=manifest,
        hash=manifest.get("row_hash") or sha256(uri),
        join_keys=join_keys(manifest, ledger),
        built_at=built_at(manifest, ledger),
    )


def built_at(manifest: dict[str, Any], ledger: Ledger) -> str:
    """Return the time of the event that a manifest names; empty if the ledger has no such event."""
    entry = ledger.get(int(manifest["seq"])) if "seq" in manifest else None
    return entry.time if entry is not None and entry.type == TrainingSetBuilt.__name__ else ""


def read_manifest(uri: str, table: pa.Table | RowFile, *, is_checked: bool = False) -> dict[str, Any]:
    """Read the manifest of a training set and compare it with the table.

    Args:
        uri: The manifest.
        table: The rows.
        is_checked: Whether the hash of the rows is known to be the manifest's.

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
    if "row_hash" in manifest and not is_checked and not has_row_hash(table, manifest["row_hash"]):
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
    """Split the rows, learn the model's signature, and encode all rows in memory.

    Raises:
        TrainingSetError: A column is missing, or a part of the split has no rows.
    """
    parts = assign_parts(config, source)
    signature = learn_signature(config, source, fit=parts == Part.fit, threshold=threshold)
    rows = EncodedRows(rows=source.row_groups, signature=signature, parts=parts)
    return load_dataset(rows)


def load_dataset(rows: EncodedRows) -> Dataset:
    """Encode all rows in memory."""
    matrix = np.empty((len(rows.parts), rows.signature.width), np.float32)
    targets: list[Any] = []
    for (begin, end), group in zip(rows.bounds(), rows.groups(), strict=True):
        matrix[begin:end] = group.matrix
        targets.append(group.target)
    return Dataset(
        signature=rows.signature,
        matrix=matrix,
        target=np.concatenate(targets),
        fit=rows.parts == Part.fit,
        validation=rows.parts == Part.validation,
        held_out=rows.parts == Part.held_out,
    )


def assign_parts(config: LearningConfig, source: TrainingSet) -> Parts:
    """Return the part of the split of each row.

    Raises:
        TrainingSetError: A column is missing, or a part of the split has no rows.
    """
    split = resolve_split(config.split, source)
    held_out = held_out_mask(split, source.table, seed=config.seed)
    is_open = open_outcomes(config, source)
    not_for_training = held_out | is_open
    validation = validation_mask(not_for_training, share=config.validation_share, seed=config.seed)
    parts = np.full(len(held_out), Part.unused, np.uint8)
    parts[held_out & ~is_open] = Part.held_out
    parts[validation] = Part.validation
    parts[~not_for_training & ~validation] = Part.fit
    for name, part in (("held-out", Part.held_out), ("training", Part.fit)):
        if not (parts == part).any():
            raise TrainingSetError(
                f"The split ({describe_split(split, source.table)}) leaves no {name} rows of {len(held_out)}. Set "
                "another `split.column` or `split.modulo`; `split.column=null` draws rows by the seed."
            )
    return parts


def open_outcomes(config: LearningConfig, source: TrainingSet) -> Mask:
    """Return the mask of the rows whose outcome may still change.

    Raises:
        TrainingSetError: The rows have no times, or nothing says up to which time outcomes are known.
    """
    return open_rows(source, window_days=config.outcome_window_days, known_until=config.outcomes_until)


def open_rows(source: TrainingSet, *, window_days: float | None, known_until: str | None) -> Mask:
    """Return the mask of the rows whose outcome may change after a time.

    Args:
        source: The training set.
        window_days: An outcome is final so many days after its row. None means that all outcomes are final.
        known_until: Time up to which outcomes are known; None means the time when the training set was built.

    Raises:
        TrainingSetError: The rows have no times, or nothing says up to which time outcomes are known.
    """
    if window_days is None:
        return np.zeros(source.table.num_rows, np.bool_)
    known_until = known_until or source.built_at
    if not known_until:
        raise TrainingSetError(
            "outcome_window_days needs the time up to which outcomes are known, and this training set has no manifest "
            "that says when it was built. Set outcomes_until=2026-01-31."
        )
    final = parse_time(known_until, name="outcomes_until") - timedelta(days=window_days)
    return np.asarray(event_times(source.table) > microseconds(final))
