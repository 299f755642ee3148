"""Read training sets below the storage root, and detect a training set that was replaced.

Three things protect such a file: it is encrypted with its features' keys, its AAD names its path, and the ledger has
the hash of its rows. An attacker who can write to the storage root but has no keys cannot replace the file unnoticed:
not by plain Parquet, and not together with another manifest. Files of earlier releases have no path in their AAD. They
can still be read, because their rows are compared with the ledger. Such a file can be replaced, but only by another
complete training set together with its manifest.
"""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from cluster.errors import TrainingSetError
from cluster.ledger import Ledger
from cluster.security.encryption.parquet import ProtectedFiles, Protection
from cluster.storage import Layout, exists
from feature_jobs.store.catalog.protection import training_set_protection
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.offline.manifest import read_manifest, require_recorded
from feature_jobs.store.offline.row_hash import Columns, has_row_hash


def training_set_aad(uri: str, places: Layout) -> str | None:
    """Return the AAD of a training set: its path below the storage root; None for a file outside of it."""
    return uri.removeprefix(f"{places.root}/") if uri.startswith(f"{places.root}/") else None


class StoredTrainingSet(NamedTuple):
    """What must be true of a training set below the storage root."""

    protection: Protection
    """Keys of the columns."""
    aad: str | None
    row_hash: str
    """Hash of the rows, as the ledger has it."""


def find_stored_training_set(
    uri: str, manifest_uri: str, *, places: Layout, ledger: Ledger
) -> StoredTrainingSet:
    """Return keys and row hash of a training set below the storage root. The rows are not read.

    Raises:
        TrainingSetError: the training set has no manifest or is not in the ledger.
    """
    if not exists(manifest_uri):
        raise TrainingSetError(
            f"{uri} is below the storage root without a manifest, so its origin is unknown. Build the training set "
            "with `python -m feature_jobs.training_set`, or move your own file out of the storage root."
        )
    manifest = read_manifest(manifest_uri)
    require_recorded(manifest, ledger)
    spec = service_spec(ledger, manifest.service, manifest.service_version)
    return StoredTrainingSet(training_set_protection(spec), training_set_aad(uri, places), manifest.row_hash)


def require_row_hash(table: pa.Table | Columns, stored: StoredTrainingSet, uri: str) -> None:
    """Require that the rows are those that were built.

    Raises:
        TrainingSetError: the rows have another hash.
    """
    if not has_row_hash(table, stored.row_hash):
        raise TrainingSetError(
            f"The rows of {uri} are not those that were built: their hash differs from the ledger's. Restore the file "
            "from a backup, or build it again with `python -m feature_jobs.training_set manifest=…`."
        )


def read_stored_training_set(
    uri: str, manifest_uri: str, *, places: Layout, ledger: Ledger, files: ProtectedFiles
) -> pa.Table:
    """Read the rows of a training set below the storage root, with the caller's keys in `files`.

    Raises:
        TrainingSetError: the training set has no manifest or is not in the ledger, or its rows have another hash.
        ProtectedFileCorrupt: the file is not encrypted, or has other keys, or belongs to another path.
        AccessDenied, KeyRevoked, KeyNotFound: the key store refuses a key.
    """
    stored = find_stored_training_set(uri, manifest_uri, places=places, ledger=ledger)
    table = files.read(uri, protection=stored.protection, place=stored.aad, unplaced=True)
    require_row_hash(table, stored, uri)
    return table
