"""Mend stored batches: read their source again and correct the rows that differ (`store/offline/mending.py`)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from cluster.errors import SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchMended
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.mending import BatchLocation, mend


def mend_batches(
    rows: pa.Table,
    stored: Mapping[str, bool],
    template: BatchMended,
    *,
    target: offline.Target,
    quarantine: QuarantineFiles,
    ledger: Ledger,
    actor: str,
) -> list[BatchMended]:
    """Mend every batch that contains rows of a source, and return one event per batch.

    Args:
        rows: the checked rows of the source.
        stored: batch id to whether the batch contains the whole source.
        template: an event with the view and the source, which is copied for each batch.
        target: the view's table.
        quarantine: the view's quarantine.
        ledger: ledger for the events.
        actor: name of the actor, for the events.

    Raises:
        SourceError: a batch contains only a part of the source, or another job rewrote the same files at the same time.
    """
    if partial := [batch for batch, is_whole in stored.items() if not is_whole]:
        raise SourceError(
            f"View '{template.view}' has this content in parts by time (batch {partial[0]}), and only whole batches "
            "can be mended."
        )
    events = []
    for batch in stored:
        pinned = offline.snapshot(
            target.uri,
            view=template.view,
            keys=target.keys,
            protection=target.protection,
            access=target.access,
        )
        place = BatchLocation(pinned=pinned, target=target, quarantine=quarantine)
        event = replace(template, batch=batch, mend_id=uuid.uuid4().hex[:16])
        events.append(mend(place, rows, event, ledger, actor=actor))
    return events


def report(event: BatchMended) -> str:
    """Return one line that describes what was mended."""
    text = (
        f"view {event.view}: batch {event.batch} again: {event.rows_in} rows in = {event.rows_kept} unchanged + "
        f"{event.rows_changed} mended + {event.rows_added} added + {event.rows_quarantined} quarantined"
    )
    removed = event.rows_in - event.rows_kept - event.rows_changed - event.rows_added - event.rows_quarantined
    text += f" + {removed} removed since" if removed else ""
    if event.table_version is None:
        return f"{text}; the table is unchanged"
    return (
        f"{text}; table version {event.table_version}. To update online values, run "
        f"`python -m feature_jobs.materialize view={event.view}`"
    )
