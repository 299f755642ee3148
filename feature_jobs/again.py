"""Ingesting a source again whose rows are stored already: its batches are mended (`store/mending.py`)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import pyarrow as pa
import ray

from cluster.errors import SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchMended
from feature_jobs.store import offline
from feature_jobs.store.catalog import ViewSpec
from feature_jobs.store.definitions import FeatureView
from feature_jobs.store.mending import Place, mend
from feature_jobs.store.protection import view_protection
from feature_jobs.storing import Checked


def mend_batches(
    view: FeatureView,
    spec: ViewSpec,
    checked: Checked,
    earlier: Mapping[str, bool],
    *,
    target: offline.Target,
    quarantine: str,
    source: tuple[str, str],
    ledger: Ledger,
    actor: str,
) -> list[BatchMended]:
    """Mend every batch that holds a source's rows; gives their events.

    Args:
        view: whose.
        spec: the same, as it was applied.
        checked: all rows of the source.
        earlier: the batches by id, and whether each is of the whole source.
        target: the view's table.
        quarantine: folder of the view's.
        source: name and digest.
        ledger: gets the events.
        actor: who does it.

    Raises:
        SourceError: a batch is of a part of the source, or another job rewrote the same files meanwhile.
    """
    if parts := [batch for batch, whole in earlier.items() if not whole]:
        raise SourceError(
            f"View '{view.name}' has this content in parts by time (batch {parts[0]}), and only whole batches can be "
            "mended."
        )
    rows = pa.concat_tables(ray.get(checked.blocks))
    events = []
    for batch in earlier:
        pinned = offline.snapshot(
            target.uri,
            view=view.name,
            keys=view.join_keys,
            protection=view_protection(spec),
            access=target.access,
        )
        place = Place(pinned=pinned, target=target, quarantine=quarantine, view=view.name)
        said = BatchMended(
            view=view.name,
            view_version=view.version,
            batch=batch,
            mend_id=uuid.uuid4().hex[:16],
            source=source[0],
            source_digest=source[1],
        )
        events.append(mend(place, rows, said, ledger, actor=actor))
    return events


def report(event: BatchMended) -> str:
    """What was done, in one line."""
    said = (
        f"view {event.view}: batch {event.batch} again: {event.rows_in} rows in = {event.rows_kept} as they were + "
        f"{event.rows_changed} mended + {event.rows_added} added + {event.rows_quarantined} quarantined"
    )
    lost = event.rows_in - event.rows_kept - event.rows_changed - event.rows_added - event.rows_quarantined
    said += f" + {lost} removed since" if lost else ""
    if event.table_version is None:
        return f"{said}; the table is as it was"
    return (
        f"{said}; table version {event.table_version}. Online values change with "
        f"`python -m feature_jobs.materialize view={event.view}`"
    )
