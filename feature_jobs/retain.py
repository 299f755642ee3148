"""`python -m feature_jobs.retain view=v [now=…]`: remove rows that are older than the view's retention, permanently.

Rows are removed from the table's newest version and from every older version: all files that contain such rows are
deleted. Training sets that were built from one of these versions are marked as not reproducible. The event states the
time before which rows were removed. If the command is killed, run it again. The next materialisation updates the online
store.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from feature_jobs.compact import newest_snapshot
from feature_jobs.materialize import parse_as_of
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec
from feature_jobs.store.definitions.limits import subtract_span
from feature_jobs.store.offline.past_retention import past_retention
from feature_jobs.store.offline.removal import RemovalReason, remove_rows


@dataclass(kw_only=True, slots=True)
class RetainConfig(PlatformConfig):
    """Configuration of the retain command."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The view is read from the ledger."""
    view: str = "???"
    """Name of the view."""
    now: str | None = None
    """ISO 8601 instant at which the rows' age is computed. None means the current time."""


@job("retain", RetainConfig, timed=True)
def main(config: RetainConfig) -> None:
    """Remove the rows of one view that are older than its retention."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="feature_jobs.retain")
    view = view_spec(ledger, config.view)
    actor.check(Action.write_features, *view_resources(view, region=config.cluster.region))
    oldest = oldest_kept(view, parse_as_of(config.now, name="now"))
    pinned = newest_snapshot(config, view, actor)
    reason = RemovalReason(
        cause=f"retention, events before {oldest.isoformat()}", older_than=oldest.isoformat()
    )
    predicate = past_retention(pinned, view.windows, oldest)
    removed = remove_rows(pinned, predicate, reason, ledger, view=view.name, actor=actor.name)
    print(f"view {view.name}: {removed} of {pinned.rows} rows removed, events before {oldest.isoformat()}")


def oldest_kept(view: ViewSpec, now: dt.datetime) -> dt.datetime:
    """Return the earliest event time that is retained. An event that is exactly as old as the retention is retained.

    Raises:
        ConfigError: The view has no retention.
    """
    if view.retention_s is None:
        raise ConfigError(
            f"View '{view.name}' has no retention: its rows are kept. Give it `retention=timedelta(…)` and apply it."
        )
    return subtract_span(now, dt.timedelta(seconds=view.retention_s))


if __name__ == "__main__":
    main()
