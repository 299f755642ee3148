"""Events of batches: find a view's earlier batches, and describe a new one."""

from __future__ import annotations

from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested, BatchMended, FeatureViewApplied
from feature_jobs.batches.reading import OpenedSource
from feature_jobs.batches.storing import StoredBatch
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.batch_history import BatchHistory, PlannedBatch


def load_history(view: FeatureView, source: OpenedSource, ledger: Ledger) -> BatchHistory:
    """Return the view's batches that contain the source's content."""
    content: dict[str, Any] = {"view": view.name, "source_digest": source.digest}
    entries = [*ledger.find(BatchIngested, **content), *ledger.find(BatchMended, **content)]
    return BatchHistory(
        view.definition(),
        source.digest,
        batches=[entry.payload for entry in sorted(entries, key=lambda entry: entry.seq)],
        definitions={
            (view.name, entry.payload["version"]): entry.payload["definition"]
            for entry in ledger.find(FeatureViewApplied, view=view.name)
        },
    )


def ingested_event(
    view: FeatureView, source: OpenedSource, plan: PlannedBatch, stored: StoredBatch, new: list[str]
) -> BatchIngested:
    """Return the event for a stored batch.

    Args:
        view: the batch's view.
        source: the source of the batch.
        plan: what was to be stored.
        stored: what was stored.
        new: source columns that the view's last batch did not have.
    """
    batch, event_range = stored.batch, plan.event_range
    return BatchIngested(
        view=view.name,
        view_version=view.version,
        ingest_id=batch.ingest_id,
        source=source.names,
        source_digest=source.digest,
        start=event_range.start.isoformat() if event_range else None,
        end=event_range.end.isoformat() if event_range else None,
        rows_in=batch.rows_in,
        rows_stored=batch.rows_stored,
        rows_quarantined=batch.rows_quarantined,
        table_version=stored.table_version,
        reasons=batch.reasons,
        quarantine=batch.quarantine,
        profile=batch.profile,
        findings=batch.findings,
        source_columns=batch.columns,
        new_columns=new,
    )
