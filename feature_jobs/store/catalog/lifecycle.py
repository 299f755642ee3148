"""Whether a view is still meant to be used: active, deprecated or retired; a fold over the ledger.

A deprecated view works and says so wherever something new is made with it. A retired one takes no more rows and goes
into no new training set; what is stored stays, and the models that were made with it go on reading it.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.errors import ViewRetired
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureViewStateChanged


class ViewState(enum.StrEnum):
    """What may be done with a view."""

    active = "active"
    deprecated = "deprecated"
    retired = "retired"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifecycle:
    """The state of a view that is not active."""

    state: ViewState
    reason: str
    since: str
    """Day, ISO 8601."""

    def text(self, view: str) -> str:
        """One sentence."""
        return f"View '{view}' is {self.state.value} since {self.since}: {self.reason.rstrip('.')}."


def read_lifecycles(ledger: Ledger) -> dict[str, Lifecycle]:
    """The views that are not active."""
    found: dict[str, Lifecycle] = {}
    for entry in ledger.entries(FeatureViewStateChanged):
        state = ViewState(entry.payload["state"])
        found.pop(entry.payload["view"], None)
        if state is not ViewState.active:
            found[entry.payload["view"]] = Lifecycle(
                state=state, reason=entry.payload["reason"], since=entry.time[:10]
            )
    return found


def heed(lifecycles: Mapping[str, Lifecycle], views: Iterable[str], *, doing: str) -> None:
    """Go on with views that may be used; a deprecated one is logged as a warning.

    Args:
        lifecycles: of the views that are not active.
        views: names.
        doing: what is about to be done, as in "no new rows are ingested".

    Raises:
        ViewRetired: naming the view and why.
    """
    for view in views:
        lifecycle = lifecycles.get(view)
        if lifecycle is None:
            continue
        if lifecycle.state is ViewState.retired:
            raise ViewRetired(
                f"{lifecycle.text(view)} {doing} Models that were made with it go on reading it. Use another view, or "
                f"take it back with `python -m feature_jobs.retire view={view} restore=true reason=…`."
            )
        logging.getLogger(__name__).warning("%s", lifecycle.text(view))
