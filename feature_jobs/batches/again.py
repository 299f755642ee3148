"""Ingesting a source again whose rows are stored already: its batches are mended (`store/offline/mending.py`)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from cluster.errors import SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchMended
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.mending import Place, mend


def mend_batches(
    rows: pa.Table,
    earlier: Mapping[str, bool],
    said: BatchMended,
    *,
    target: offline.Target,
    quarantine: str,
    ledger: Ledger,
    actor: str,
) -> list[BatchMended]:
    """Mend every batch that holds a source's rows; gives their events.

    Args:
        rows: of the source, checked.
        earlier: the batches by id, and whether each is of the whole source.
        said: an event with the view and the source.
        target: the view's table.
        quarantine: folder of the view's.
        ledger: gets the events.
        actor: who does it.

    Raises:
        SourceError: a batch is of a part of the source, or another job rewrote the same files meanwhile.
    """
    if parts := [batch for batch, whole in earlier.items() if not whole]:
        raise SourceError(
            f"View '{said.view}' has this content in parts by time (batch {parts[0]}), and only whole batches can be "
            "mended."
        )
    events = []
    for batch in earlier:
        pinned = offline.snapshot(
            target.uri,
            view=said.view,
            keys=target.keys,
            protection=target.protection,
            access=target.access,
        )
        place = Place(pinned=pinned, target=target, quarantine=quarantine, view=said.view)
        one = replace(said, batch=batch, mend_id=uuid.uuid4().hex[:16])
        events.append(mend(place, rows, one, ledger, actor=actor))
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
