"""`python -m feature_jobs.compact view=v`: replace the table's many small files by a few large files.

The files of each bucket are merged into one file, sorted for the point-in-time join. One transaction replaces the old
files by the new ones. If the command is killed, run it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltalake import DeltaTable

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import FeatureTableRewritten
from cluster.ledger.table_versions import unrecorded
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec
from feature_jobs.store.offline.compaction import current_target, fragmented_buckets, past_rewrites, rewrite
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.view_tables import view_snapshot


@dataclass(kw_only=True, slots=True)
class CompactConfig(PlatformConfig):
    """Configuration of `feature_jobs.compact`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The view is read from the ledger."""
    view: str = "???"


@job("compact", CompactConfig, timed=True)
def main(config: CompactConfig) -> None:
    """Compact one view's table."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="feature_jobs.compact")
    view = view_spec(ledger, config.view)
    actor.check(Action.write_features, *view_resources(view, region=config.cluster.region))
    pinned = newest_snapshot(config, view, actor)
    buckets = fragmented_buckets(pinned)
    if buckets:
        rewrite(pinned, current_target(pinned), buckets)
    replaced = record_rewrites(ledger, view.name, pinned.uri, actor=actor.name)
    after = newest_snapshot(config, view, actor)
    print(
        f"view {view.name}: {replaced} files replaced, {len(after.files)} left, table version {after.version}"
    )


def newest_snapshot(config: PlatformConfig, view: ViewSpec, actor: Actor) -> Snapshot:
    """Return the newest snapshot of the view's table."""
    return view_snapshot(view, layout(config.storage), actor.access)


def record_rewrites(ledger: Ledger, view: str, uri: str, *, actor: str) -> int:
    """Append an event for each rewrite of the table that has no event yet, also if the rewriting command was killed.

    Returns:
        The number of files that these rewrites replaced.
    """
    rewrites = past_rewrites(DeltaTable(uri))
    new = unrecorded(ledger, FeatureTableRewritten, rewrites, view=view)
    for version in new:
        rewrite = rewrites[version]
        event = FeatureTableRewritten(
            view=view, table_version=version, files_replaced=rewrite.files, num_buckets=rewrite.buckets
        )
        ledger.append(event, actor=actor)
    return sum(rewrites[version].files for version in new)


if __name__ == "__main__":
    main()
