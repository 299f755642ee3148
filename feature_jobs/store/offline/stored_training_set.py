"""Training sets that are kept below the storage root, read so that nobody can have put others in their place.

Such a file is under its features' keys, says where it belongs, and its rows are those whose hash the ledger has. Who
can write to the storage root, but has no keys, can exchange none of the three unseen: nor lay plain Parquet there, nor
a manifest of his own. Files of earlier releases say nothing of their place; their rows are held against the ledger all
the same, so they can still be read, and only one whole set could stand in another's place, together with its manifest.
"""

from __future__ import annotations

import pyarrow as pa

from cluster.errors import TrainingSetError
from cluster.ledger import Ledger
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.storage import Layout, exists
from feature_jobs.store.catalog.protection import training_set_protection
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.offline.manifest import check_known, read_manifest
from feature_jobs.store.offline.row_hash import has_row_hash


def place_of(uri: str, places: Layout) -> str | None:
    """Where a training set says it belongs: its path below the storage root; none for one that leaves the platform."""
    return uri.removeprefix(f"{places.root}/") if uri.startswith(f"{places.root}/") else None


def read_kept(
    uri: str, manifest_uri: str, *, places: Layout, ledger: Ledger, files: ProtectedFiles
) -> pa.Table:
    """The rows of a training set below the storage root; `files` has the keys of the caller.

    Raises:
        TrainingSetError: there is no manifest beside it, the ledger does not know it, or the rows are others.
        ProtectedFileCorrupt: the file is in the clear, under other keys, or belongs elsewhere.
        AccessDenied, KeyRevoked, KeyNotFound: as the key store says.
    """
    if not exists(manifest_uri):
        raise TrainingSetError(
            f"{uri} lies below the storage root without a manifest, so nobody can say that it was built here. Build "
            "it with `python -m feature_jobs.training_set`, or put a file of your own outside."
        )
    manifest = read_manifest(manifest_uri)
    check_known(manifest, ledger)
    spec = service_spec(ledger, manifest.service, manifest.service_version)
    table = files.read(
        uri, protection=training_set_protection(spec), place=place_of(uri, places), unplaced=True
    )
    if not has_row_hash(table, manifest.row_hash):
        raise TrainingSetError(
            f"The rows of {uri} are not those that were built: their hash is not the ledger's. Restore the file from "
            "a backup, or build it again with `python -m feature_jobs.training_set manifest=…`."
        )
    return table
