"""`python -m feature_jobs.rebucket view=v [buckets=64]`: distribute a table's rows over another number of buckets.

The commands that work bucket by bucket (materialise, training set, compact) need memory for a bucket. A table that has
grown needs more buckets. `feature_jobs.ingest` says when. Without `buckets`, the number fits the table's size, and a
table that has enough buckets is not changed.

One transaction switches to the new buckets. If the command is killed, run it again. Rows that other commands store in
the meantime stay. A batch that is ingested at the same time may be refused. Then ingest it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import open_ledger
from cluster.placement import Selector, find_nodes
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.session import attach, require_running_cluster
from cluster.settings import PlatformConfig
from feature_jobs.batches.work import Work
from feature_jobs.compact import newest_snapshot, record_rewrites
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.definitions.limits import validate_num_buckets
from feature_jobs.store.offline.buckets import buckets_for
from feature_jobs.store.offline.rebucketing import rebucket
from feature_jobs.view_tables import stored_columns


@dataclass(kw_only=True, slots=True)
class RebucketConfig(PlatformConfig):
    """Configuration of `feature_jobs.rebucket`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The view is read from the ledger."""
    view: str = "???"
    buckets: int | None = None
    """The new number of buckets; null chooses it by the table's size."""
    task_values: int = 50_000_000
    """Number of values (rows times columns) above which Ray tasks write the table."""

    def __post_init__(self) -> None:
        if self.buckets is not None:
            validate_num_buckets(self.buckets, option="buckets")


@job("rebucket", RebucketConfig, timed=True)
def main(config: RebucketConfig) -> None:
    """Rebucket one view's table."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="feature_jobs.rebucket")
    view = view_spec(ledger, config.view)
    actor.check(Action.write_features, *view_resources(view, region=config.cluster.region))
    before = newest_snapshot(config, view, actor)
    columns = stored_columns(view)
    wanted = config.buckets or max(buckets_for(before.rows * columns), before.num_buckets)
    if wanted == before.num_buckets:
        record_rewrites(ledger, view.name, before.uri, actor=actor.name)
        print(f"view {view.name}: {before.rows} rows in {wanted} buckets already; nothing to do")
        return
    work = Work(config.task_values, lambda: attach_for_table(config))
    work.expect(before.rows * columns)
    result = rebucket(
        lambda: newest_snapshot(config, view, actor), wanted, num_columns=columns, run_all=work.run_all
    )
    record_rewrites(ledger, view.name, before.uri, actor=actor.name)
    print(
        f"view {view.name}: {wanted} buckets instead of {before.num_buckets}, {result.files} files replaced, table "
        f"version {result.version}"
    )


def attach_for_table(config: RebucketConfig) -> Selector:
    """Attach to Ray, and return where tasks may run."""
    attach(config)
    return find_nodes(config.placement)


if __name__ == "__main__":
    main()
