"""Open a view's feature table, for reading at one version or for writing, and its quarantine."""

from __future__ import annotations

from cluster.errors import TrainingSetError
from cluster.security.keys.access import KeyAccess
from cluster.storage import Layout
from feature_jobs.store.catalog.protection import view_protection
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.offline.buckets import BUCKET_VALUES, buckets_for
from feature_jobs.store.offline.tables import Snapshot, Target, num_buckets, open_table, snapshot

REBUCKET_FACTOR = 4
"""A table should be rebucketed if a new table of its size would get this many times its buckets."""


def view_snapshot(
    view: ViewSpec, places: Layout, access: KeyAccess, *, version: int | None = None
) -> Snapshot:
    """Return a view's table at a version; None is the newest.

    Raises:
        TrainingSetError: the view has no rows, or the version does not exist.
    """
    return snapshot(
        places.features(view.name),
        view=view.name,
        keys=view.join_keys,
        protection=view_protection(view),
        access=access,
        version=version,
    )


def stored_columns(view: ViewSpec) -> int:
    """Return the number of columns of a view's table: join keys, fields, three times and `ingest_seq`."""
    return len(view.join_keys) + len(view.stored) + 4


def view_target(view: ViewSpec, places: Layout, access: KeyAccess, *, new_buckets: int) -> Target:
    """Return a view's table as a target for new rows.

    Args:
        view: the applied view.
        places: layout of the storage root.
        access: access to the keys.
        new_buckets: number of buckets of the table if it does not exist yet.
    """
    uri = places.features(view.name)
    table = open_table(uri)
    return Target(
        uri=uri,
        keys=tuple(view.join_keys),
        buckets=new_buckets if table is None else num_buckets(table),
        protection=view_protection(view),
        access=access,
    )


def rebucket_advice(view: ViewSpec, places: Layout, access: KeyAccess) -> str:
    """Return a line that advises to rebucket the view's table; empty if its buckets are small enough."""
    try:
        table = view_snapshot(view, places, access)
    except TrainingSetError:  # no rows yet
        return ""
    values = table.rows * stored_columns(view)
    buckets = buckets_for(values)
    if values <= BUCKET_VALUES * table.num_buckets or buckets < REBUCKET_FACTOR * table.num_buckets:
        return ""
    return (
        f"view {view.name}: {table.rows} rows in {table.num_buckets} buckets need much memory per bucket; run `python "
        f"-m feature_jobs.rebucket view={view.name}`, which makes {buckets} buckets"
    )


def view_quarantine(view: str, places: Layout, access: KeyAccess) -> QuarantineFiles:
    """Return the quarantine of the view with this name."""
    return QuarantineFiles(folder=places.quarantine(view), view=view, access=access)
