"""`python -m feature_jobs.quarantine view=v [batch=…] [rows=10]`: what lies in a view's quarantine, and why.

How many rows of which batch failed for what reason stands in the ledger. The rows themselves are shown with `rows=`, to
whoever may read columns of every class of the view.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ConfigError, SourceError, did_you_mean
from cluster.ledger import open_ledger
from cluster.security.acting import act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import exists, layout
from feature_jobs.store.catalog.protection import quarantine_place, quarantine_protection
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec
from feature_jobs.store.ingestion.quarantine import quarantined


@dataclass(kw_only=True, slots=True)
class QuarantineConfig(PlatformConfig):
    """Whose quarantine, and how much of it."""

    definitions: str = "feature_jobs.census"
    """Named for symmetry with the other commands: the view is read as it was applied."""
    view: str = "???"
    batch: str | None = None
    """The `ingest_id` of one batch; none is all of them."""
    rows: int = 0
    """Show so many rows of each batch."""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows must not be negative, got {self.rows}.")


@job("quarantine", QuarantineConfig)
def main(config: QuarantineConfig) -> None:
    """Show one view's quarantine."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.quarantine")
    spec = view_spec(ledger, config.view)
    whole = resource(spec, region=config.cluster.region)
    actor.check(Action.read_columns if config.rows else Action.read_metadata, whole)
    batches = quarantined((entry.event() for entry in ledger.entries()), spec.name)
    if config.batch is not None:
        if config.batch not in batches:
            raise ConfigError(
                f"View '{spec.name}' has no batch '{config.batch}' in quarantine.{did_you_mean(config.batch, batches)}"
            )
        batches = {config.batch: batches[config.batch]}
    total = sum(sum(reasons.values()) for reasons in batches.values())
    print(f"view {spec.name}: {total} rows in quarantine, of {len(batches)} batches")
    for batch, reasons in batches.items():
        print(f"batch {batch}: {sum(reasons.values())} rows")
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            print(f"  {count} {reason}")
        if config.rows:
            path = f"{layout(config.storage).quarantine(spec.name)}/{batch}.parquet"
            if not exists(path):
                raise SourceError(f"{path} is gone. Restore it from a backup.")
            file = protected_files(actor.access).read(
                path,
                protection=quarantine_protection(spec.name),
                place=quarantine_place(spec.name, batch),
                unplaced=True,
            )
            for row in file.slice(0, config.rows).select(["reason", "raw"]).to_pylist():
                print(json.dumps({"reason": row["reason"], "row": json.loads(row["raw"])}))


def resource(spec: ViewSpec, *, region: str) -> Resource:
    """A view's quarantine as the policies see it: whole source rows, so as sensitive as can be."""
    return Resource(
        kind="quarantine",
        name=spec.name,
        column_class="sensitive",
        purposes=spec.purposes,
        region=spec.region or region,
    )


if __name__ == "__main__":
    main()
