"""`python -m feature_jobs.quarantine view=v [batch=…] [rows=10]`: show a view's quarantine.

The command prints the number of rows by batch and reason, from the ledger. With `rows=…`, it also prints rows. Then the
caller needs the right to read sensitive columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ConfigError, SourceError, did_you_mean
from cluster.ledger import open_ledger
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec
from feature_jobs.store.ingestion.quarantine import quarantined
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.view_tables import view_quarantine


@dataclass(kw_only=True, slots=True)
class QuarantineConfig(PlatformConfig):
    """Configuration of `feature_jobs.quarantine`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The view is read from the ledger."""
    view: str = "???"
    batch: str | None = None
    """`ingest_id` of one batch; None shows all batches."""
    rows: int = 0
    """How many rows of each batch to show."""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"rows must not be negative, got {self.rows}.")


@job("quarantine", QuarantineConfig)
def main(config: QuarantineConfig) -> None:
    """Show one view's quarantine."""
    ledger = open_ledger(config)
    actor = create_actor(
        config, require_running_cluster(config), ledger, entrypoint="feature_jobs.quarantine"
    )
    spec = view_spec(ledger, config.view)
    action = Action.read_columns if config.rows else Action.read_metadata
    actor.check(action, resource(spec, region=config.cluster.region))
    batches = quarantined(ledger, spec.name)
    if config.batch is not None:
        if config.batch not in batches:
            raise ConfigError(
                f"View '{spec.name}' has no batch '{config.batch}' in quarantine.{did_you_mean(config.batch, batches)}"
            )
        batches = {config.batch: batches[config.batch]}
    total = sum(sum(reasons.values()) for reasons in batches.values())
    print(f"view {spec.name}: {total} rows in quarantine, of {len(batches)} batches")
    files = view_quarantine(spec.name, layout(config.storage), actor.access)
    for batch, reasons in batches.items():
        print(f"batch {batch}: {sum(reasons.values())} rows")
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            print(f"  {count} {reason}")
        if config.rows:
            print_rows(files, batch, config.rows)


def print_rows(files: QuarantineFiles, batch: str, limit: int) -> None:
    """Print the first rows of a batch's quarantine, each as one line of JSON.

    Raises:
        SourceError: the batch's file is missing.
    """
    if not files.exists(batch):
        raise SourceError(f"{files.path(batch)} is missing. Restore it from a backup.")
    for row in files.read(batch).slice(0, limit).select(["reason", "raw"]).to_pylist():
        print(json.dumps({"reason": row["reason"], "row": json.loads(row["raw"])}))


def resource(spec: ViewSpec, *, region: str) -> Resource:
    """Return a view's quarantine as a policy resource. It contains whole source rows, so its class is sensitive."""
    return Resource(
        kind="quarantine",
        name=spec.name,
        column_class="sensitive",
        purposes=spec.purposes,
        region=spec.region or region,
    )


if __name__ == "__main__":
    main()
