"""Lifecycle of views: active, deprecated or retired, according to the ledger's events.

A deprecated view works, but new rows and new training sets of it log a warning. A retired view accepts no new rows and
cannot be used for new training sets. Its stored rows stay, and models that were trained with it continue to read it.
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
    """Lifecycle state of a view."""

    active = "active"
    deprecated = "deprecated"
    retired = "retired"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifecycle:
    """The state of a view that is not active."""

    state: ViewState
    reason: str
    since: str
    """Date of the change, ISO 8601."""

    def text(self, view: str) -> str:
        """Return one sentence with the view's state, date and reason."""
        return f"View '{view}' is {self.state.value} since {self.since}: {self.reason.rstrip('.')}."


def read_lifecycles(ledger: Ledger) -> dict[str, Lifecycle]:
    """Read the states of the views that are not active, by view name."""
    lifecycles: dict[str, Lifecycle] = {}
    for entry in ledger.entries(FeatureViewStateChanged):
        view, state = entry.payload["view"], ViewState(entry.payload["state"])
        lifecycles.pop(view, None)
        if state is not ViewState.active:
            lifecycles[view] = Lifecycle(state=state, reason=entry.payload["reason"], since=entry.time[:10])
    return lifecycles


def require_not_retired(lifecycles: Mapping[str, Lifecycle], views: Iterable[str], *, doing: str) -> None:
    """Require that no view is retired. Log a warning for each deprecated view.

    Args:
        lifecycles: The states of the views that are not active.
        views: Names of the views to check.
        doing: A sentence with the effect of a refusal, such as "No new rows are ingested."

    Raises:
        ViewRetired: A view is retired. The message contains the reason.
    """
    for view in views:
        lifecycle = lifecycles.get(view)
        if lifecycle is None:
            continue
        if lifecycle.state is ViewState.retired:
            raise ViewRetired(
                f"{lifecycle.text(view)} {doing} Models that were trained with it continue to read it. Use another "
                f"view, or restore this one with `python -m feature_jobs.retire view={view} restore=true reason=…`."
            )
        logging.getLogger(__name__).warning("%s", lifecycle.text(view))
