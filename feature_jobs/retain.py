"""`python -m feature_jobs.retain view=v [now=…]`: rows older than the view's retention are removed for good.

From the table's newest version and from every older one: the files that hold them are deleted, and training sets that
were built from such a version are marked not reproducible. Killed at any point, run it again. The online store follows
at the next materialisation; the event says which moment the rows were older than.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import ConfigError
from cluster.ledger import open_ledger
from cluster.security.acting import act
from cluster.security.authorization.policy import Action
from cluster.session import require_record
from cluster.settings import PlatformConfig
from feature_jobs.compact import newest
from feature_jobs.materialize import instant
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec, view_spec
from feature_jobs.store.definitions.limits import before
from feature_jobs.store.offline.past_retention import past_retention
from feature_jobs.store.offline.removal import Reason, remove


@dataclass(kw_only=True, slots=True)
class RetainConfig(PlatformConfig):
    """Which view, as of when."""

    definitions: str = "feature_jobs.census"
    """Named for symmetry with the other commands: the view is read as it was applied."""
    view: str = "???"
    now: str | None = None
    """ISO 8601 instant from which age counts; none is now."""


@job("retain", RetainConfig, timed=True)
def main(config: RetainConfig) -> None:
    """Remove what is too old."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.retain")
    view = view_spec(ledger, config.view)
    actor.check(Action.write_features, *view_resources(view, region=config.cluster.region))
    oldest = oldest_kept(view, instant(config.now, name="now"))
    pinned = newest(config, view, actor)
    reason = Reason(cause=f"retention, events before {oldest.isoformat()}", older_than=oldest.isoformat())
    where = past_retention(pinned, view.windows, oldest)
    removed = remove(pinned, where, reason, ledger, view=view.name, actor=actor.name)
    print(f"view {view.name}: {removed} of {pinned.rows} rows removed, events before {oldest.isoformat()}")


def oldest_kept(view: ViewSpec, now: dt.datetime) -> dt.datetime:
    """The earliest event that is kept; one exactly as old as the retention is.

    Raises:
        ConfigError: the view keeps its rows for ever.
    """
    if view.retention_s is None:
        raise ConfigError(
            f"View '{view.name}' has no retention: its rows are kept. Give it `retention=timedelta(…)` and apply it."
        )
    return before(now, dt.timedelta(seconds=view.retention_s))


if __name__ == "__main__":
    main()
