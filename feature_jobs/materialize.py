"""`python -m feature_jobs.materialize view=v [as_of=…]`: write each entity's newest values to the online store.

The values are those that were known at `as_of`. Readers get either all rows of a materialisation or none. If the
command is killed, the store is unchanged. The command reads one version of the table. Rows that were pushed after that
version stay online.

`view=[a,b]` and `view=all` (every applied view with rows) materialise one view after the other, with the same `as_of`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deltalake import DeltaTable

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ViewMaterialized
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.security.keys.access import key_store
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.batches.multiple_views import for_each, resolve_views, validate_views
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec, view_specs
from feature_jobs.store.ingestion.ranges import parse_instant
from feature_jobs.store.offline.point_in_time import latest_rows
from feature_jobs.store.offline.tables import Snapshot, open_table
from feature_jobs.store.online.events import merge_function
from feature_jobs.store.online.frames import online_rows
from feature_jobs.store.online.reader import open_online_store
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.online.window_rows import state_rows
from feature_jobs.store.online.window_states import stored_view
from feature_jobs.store.streaming.micro_batches import table_horizon
from feature_jobs.view_tables import view_snapshot


@dataclass(kw_only=True, slots=True)
class MaterializeConfig(PlatformConfig):
    """Configuration of `feature_jobs.materialize`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The view is read from the ledger."""
    view: Any = "???"
    """A name, a list of names, or `all`."""
    as_of: str | None = None
    """ISO 8601 instant. Rows that became known later are left out. None means now."""

    def __post_init__(self) -> None:
        validate_views(self.view)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The state that all views of one command share."""

    config: MaterializeConfig
    ledger: Ledger
    actor: Actor
    store: OnlineStore
    as_of: dt.datetime


@job("materialize", MaterializeConfig, timed=True)
def main(config: MaterializeConfig) -> None:
    """Materialise each view."""
    ledger = open_ledger(config)
    actor = create_actor(
        config, require_running_cluster(config), ledger, entrypoint="feature_jobs.materialize"
    )
    places, as_of = layout(config.storage), parse_as_of(config.as_of)
    views_with_rows = (name for name in view_specs(ledger) if open_table(places.features(name)) is not None)
    views = resolve_views(config.view, views_with_rows)
    store = open_online_store(config.online, places, key_store(actor.access), readonly=False)
    run = Run(config=config, ledger=ledger, actor=actor, store=store, as_of=as_of)
    try:
        for_each(views, lambda view: materialise(run, view))
    finally:
        store.close()


def materialise(run: Run, name: str) -> None:
    """Put the newest known values of a view's entities into the online store.

    Raises:
        RefusedError: the view has no rows, or the caller may not write it; nothing was changed.
    """
    view = view_spec(run.ledger, name)
    run.actor.check(Action.write_features, *view_resources(view, region=run.config.cluster.region))
    pinned = view_snapshot(view, layout(run.config.storage), run.actor.access)
    table = DeltaTable(pinned.uri, version=pinned.version)
    num_entities = run.store.replace(
        stored_view(view),
        pinned.key_types,
        newest_rows(view, pinned, run.as_of),
        horizon=table_horizon(table),
        merge=merge_function(view),
    )
    event = ViewMaterialized(
        view=view.name,
        view_version=view.version,
        table_version=pinned.version,
        as_of=run.as_of.isoformat(),
        entities=num_entities,
    )
    run.ledger.append(event, actor=run.actor.name)
    print(f"view {view.name}: {num_entities} entities online as of {run.as_of.isoformat()}", flush=True)


def newest_rows(view: ViewSpec, pinned: Snapshot, as_of: dt.datetime) -> Iterator[OnlineRow]:
    """For each entity, yield the newest row that was known at `as_of`, bucket by bucket.

    A deleted entity's row is its tombstone. The rows of a view with aggregations contain the state of its windows.
    """
    if view.windows is not None:
        yield from state_rows(pinned, view.windows, as_of)
        return
    keys = list(pinned.key_types)
    names = [field.name for field in view.fields]
    for bucket in range(pinned.num_buckets):
        features = pinned.read(bucket, names)
        if not features.is_empty():
            yield from online_rows(view, latest_rows(features, keys=keys, as_of=as_of, tombstones=True))


def parse_as_of(text: str | None, *, name: str = "as_of") -> dt.datetime:
    """Parse an ISO 8601 instant. A text without a time zone is UTC; None is now.

    Raises:
        ConfigError: the text is not an instant.
    """
    return dt.datetime.now(dt.UTC) if text is None else parse_instant(text, name=name)


if __name__ == "__main__":
    main()
